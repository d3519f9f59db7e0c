"""The metrics of TRACE's tasks, each from 0 to 100. See trace.py.

The edit similarity is rapidfuzz's. SARI is written here: `evaluate` fetches its SARI from the hub when it is used, and
no maintained package on the index has one that works offline.
"""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from rapidfuzz import fuzz

_LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.DOTALL)
_WORD = re.compile(r"\w+|[^\w\s]")
_PARAGRAPH = re.compile(r"Paragraph:\n(.*?)\s*(?:Simplification:)?\s*$", re.DOTALL)


def letter(source: str, generated: str, answer: str) -> float:
    """100 where the first character of the generated text is the answer's letter; the reasons do not count."""
    return 100.0 * (generated.strip()[:1] == answer.strip()[:1])


def exact(source: str, generated: str, answer: str) -> float:
    """100 where the generated text is the answer, but for space around it."""
    return 100.0 * (generated.strip() == answer.strip())


def similarity(source: str, generated: str, answer: str) -> float:
    """200 M / T of two lines of code, where M is the length of their longest common subsequence and T that of both.

    TRACE's placeholders of literals are written out first, as in its own evaluation; an empty text scores 0.
    """
    texts = [written_out(text).strip() for text in (generated, answer)]
    return fuzz.ratio(*texts) if all(texts) else 0.0


def written_out(code: str) -> str:
    """Code of Py150 with its placeholders replaced: `<STR_LIT:a>` by `a`, `<NUM_LIT>` by 0, the others by nothing."""
    code = code.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
    return _LITERAL.sub(r"\1", code)


def sari(source: str, generated: str, answer: str) -> float:
    """SARI of a simplification (Xu et al. 2016, TACL, Q16-1029) with one reference and n-grams up to 4.

        SARI = 100 (F1_add + F1_keep + P_del) / 3, each a mean over n

    0/0 is 1, and the recall of what is kept is over counts, as in the version of `evaluate` that TRACE uses. Words are
    lower-cased and split from punctuation.

    Args:
        source: a prompt of 20Minuten, or the paragraph alone.
    """
    found = _PARAGRAPH.search(source)
    texts = [_WORD.findall(text.lower()) for text in (found[1] if found else source, generated, answer)]
    return 100.0 * statistics.fmean(
        statistics.fmean(_operations(*(_ngrams(words, length) for words in texts))) for length in (1, 2, 3, 4)
    )


def _ngrams(words: Sequence[str], length: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[place : place + length]) for place in range(len(words) - length + 1))


def _operations(source: Counter, generated: Counter, answer: Counter) -> tuple[float, float, float]:
    """F1 of the n-grams that were added, F1 of those that were kept, precision of those that were deleted."""
    kept, to_keep = source & generated, source & answer
    kept_well = kept & answer
    keep = _f1(
        _share(sum(kept_well[gram] / kept[gram] for gram in kept), len(kept)),
        _share(kept_well.total(), to_keep.total()),
    )
    deleted = source - generated
    deleted_well = deleted - answer
    delete = _share(sum(deleted_well[gram] / deleted[gram] for gram in deleted), len(deleted))
    added, to_add = set(generated) - set(source), set(answer) - set(source)
    added_well = len(added & to_add)
    return _f1(_share(added_well, len(added)), _share(added_well, len(to_add))), keep, delete


def _share(part: float, whole: int) -> float:
    return part / whole if whole else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


METRICS: dict[str, Callable[[str, str, str], float]] = {
    "C-STANCE": letter,
    "FOMC": letter,
    "Py150": similarity,
    "ScienceQA": letter,
    "NumGLUE-cm": exact,
    "NumGLUE-ds": exact,
    "20Minuten": sari,
}
"""What each task is judged by: (prompt, generated text, right answer) to points."""


def score(task: str, sources: Sequence[str], generated: Sequence[str], answers: Sequence[str]) -> float:
    """Mean points of a task over its rows."""
    return statistics.fmean(map(METRICS[task], sources, generated, answers))
