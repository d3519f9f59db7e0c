"""What the skill library, the novelty detector and the gate fit are worth, before anything is trained.

    python benchmarks/continual/novelty.py [--model smollm2-135m] [--rows 112] [--held_out 64]

The router's features at the embeddings, half-life 32; five languages learned one after another in two orders, other
kinds of text that are never learned, and a pair that is alike in words (`benchmarks/continual/skills.py`).
Held-out rows are from other documents. Tables: routing with rows fitted one at a time and refitted together, by what
stands for the base's own text; novelty by batch size; growth of the cost with the pool.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from skills import LANGUAGES, OTHERS, PAIR, read_skill
from torch import Tensor

from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.continual.base_texts import write_texts
from dylo_moe.continual.gate_fit import fit_row, refit_rows
from dylo_moe.continual.novelty_detector import judge
from dylo_moe.continual.skill_library import SkillLibrary
from dylo_moe.routing.config import BASE, RouterConfig
from dylo_moe.routing.features import causal_exponential_mean
from dylo_moe.routing.router import Router

HALF_LIFE = 32.0
SPANS = ((0, 8), (8, 32), (32, 128), (128, 256))
SWITCH_AFTER, SWITCH_SPAN = 3, (32, 160)  # in rows; in tokens of the next skill
BATCH_SIZES = (1, 2, 4, 16, 32, 64)
NUM_BATCHES = 200
RATE = 0.01
Texts = list[Tensor]


@torch.no_grad()
def features(embedding: Tensor, ids: Tensor, mask: Tensor) -> Texts:
    """What the router reads of each row, padding left out."""
    texts = []
    for some_ids, some_mask in zip(ids.split(32), mask.bool().split(32), strict=True):
        rows = causal_exponential_mean(embedding[some_ids], mask=some_mask, half_life=HALF_LIFE)[0]
        texts += [row[real] for row, real in zip(rows, some_mask, strict=True)]
    return texts


def grown(order: Sequence[str], train: dict[str, Texts], base: Texts | None) -> tuple[Router, SkillLibrary]:
    """Skills learned in order, each row fitted when its skill arrives."""
    size = train[order[0]][0].shape[1]
    router, library = Router(RouterConfig(), hidden_size=size, names=()), SkillLibrary(size)
    router.add_base()
    if base is not None:
        library.learn(BASE, base, expert=BASE)
    for name in order:
        library.learn(name, train[name], expert=name)
        router.add_row(name)
        router.set_row(name, *fit_row(router, library, name, seed=0))
    return router, library


@torch.no_grad()
def share(router: Router, texts: Texts, name: str, start: int = 0, stop: int | None = None) -> float:
    """Share of the tokens of some texts that go to one member."""
    logits = router.logits(torch.cat([text[start:stop] for text in texts]))
    return float((logits.argmax(1) == router.names.index(name)).double().mean())


def routing_row(router: Router, held_out: dict[str, Texts], switched: dict[str, Texts]) -> str:
    """Mean accuracy by position and after a change of subject; the worst skill; what the base takes, and gets."""
    skills = [name for name in router.names if name != BASE]
    cells = [sum(share(router, held_out[name], name, *span) for name in skills) / len(skills) for span in SPANS]
    is_switched = all(name in switched for name in skills)
    cells.append(sum(share(router, switched[name], name) for name in skills) / len(skills) if is_switched else math.nan)
    cells.append(min(share(router, held_out[name], name) for name in skills))
    cells.append(sum(share(router, held_out[name], BASE) for name in skills) / len(skills))
    cells += [share(router, held_out[name], BASE) for name in OTHERS if name in held_out]
    return " | ".join("-" if math.isnan(cell) else f"{cell:.3f}" for cell in cells)


def print_routing(
    skills: Sequence[str],
    train: dict[str, Texts],
    held_out: dict[str, Texts],
    switched: dict[str, Texts],
    bases: dict[str, Texts | None],
) -> None:
    """Token routing of both orders, rows fitted in turn and refitted together."""
    others = [name for name in OTHERS if name in held_out]
    print(f"\n{', '.join(skills)}")
    head = [*(f"{start}-{stop}" for start, stop in SPANS), "switch", "worst skill", "lost to base"]
    print("| base's text | rows | " + " | ".join([*head, *(f"{name} to base" for name in others)]) + " |")
    print("|---" * (len(head) + len(others) + 2) + "|")
    for name, base in bases.items():
        for order in (skills, skills[::-1]):
            router, library = grown(order, train, base)
            print(f"| {name} | in turn, {order[0]} first | {routing_row(router, held_out, switched)} |", flush=True)
        for expert, row in refit_rows(router, library).items():
            router.set_row(expert, *row)
        print(f"| {name} | refitted | {routing_row(router, held_out, switched)} |", flush=True)


def raw_cosine(library: SkillLibrary, texts: Texts) -> float:
    """1 - cosine of the batch's mean with the nearest skill's, not centred."""
    batch = torch.stack([text.mean(0) for text in texts]).mean(0)
    means = torch.stack([library[name].mean for name in library.skills])
    return 1 - float(F.cosine_similarity(batch[None], means).max())


def area(known: list[float], new: list[float]) -> float:
    """Area under the ROC curve: the chance that a new batch scores above a known one."""
    a, b = torch.tensor(known)[None], torch.tensor(new)[:, None]
    return float((b > a).double().mean() + 0.5 * (b == a).double().mean())


def print_novelty(train: dict[str, Texts], held_out: dict[str, Texts], skills: Sequence[str]) -> None:
    """Every subset of the skills known and the rest new, for each size of batch."""
    rng = random.Random(0)
    subsets = [known for size in range(1, len(skills)) for known in itertools.combinations(skills, size)]
    per_subset = -(-NUM_BATCHES // len(subsets))
    # Only a text's mean is looked at, so texts of one token that is it are judged alike, and sooner.
    held_out = {name: [text.mean(0, keepdim=True) for text in held_out[name]] for name in skills}
    libraries = [grown_library(known, train) for known in subsets]
    low, high = binomial_interval(per_subset * len(subsets), RATE)
    print(f"\n{', '.join(skills)}: {len(subsets)} subsets known, {per_subset} known and new batches each")
    print(
        f"| batch | mahalanobis | worst subset | centred cosine | raw cosine | false, {low}-{high} expected | missed |"
    )
    print("|---" * 7 + "|")
    for size in BATCH_SIZES:
        methods: dict[str, Callable[[SkillLibrary, Texts], float]] = {
            "mahalanobis": lambda library, texts: judge(library, texts).score,
            "centred cosine": lambda library, texts: -judge(library, texts, method="cosine").score,
            "raw cosine": raw_cosine,
        }
        areas: dict[str, list[float]] = {name: [] for name in methods}
        false = missed = 0
        for known, library in zip(subsets, libraries, strict=True):
            batches = {
                is_new: [
                    rng.sample(held_out[rng.choice([s for s in skills if (s in known) != is_new])], size)
                    for _ in range(per_subset)
                ]
                for is_new in (False, True)
            }
            for name, score in methods.items():
                areas[name].append(area(*([score(library, texts) for texts in batches[new]] for new in (False, True))))
            false += sum(judge(library, texts, false_alarm_rate=RATE).novel for texts in batches[False])
            missed += sum(not judge(library, texts, false_alarm_rate=RATE).novel for texts in batches[True])
        means = [sum(areas[name]) / len(subsets) for name in methods]
        cells = [means[0], min(areas["mahalanobis"]), *means[1:]]
        total = per_subset * len(subsets)
        print(f"| {size} | " + " | ".join(f"{cell:.4f}" for cell in cells), end="")
        print(f" | {false} of {total} | {missed} of {total} |", flush=True)


def grown_library(names: Sequence[str], train: dict[str, Texts]) -> SkillLibrary:
    """A library that learned some skills, in that order."""
    library = SkillLibrary(train[names[0]][0].shape[1])
    for name in names:
        library.learn(name, train[name], expert=name)
    return library


def binomial_interval(count: int, rate: float) -> tuple[int, int]:
    """Where the number of successes lies with 95 % probability, equal tails."""
    k = torch.arange(count + 1, dtype=torch.float64)
    log_p = torch.lgamma(torch.tensor(count + 1.0, dtype=torch.float64)) - torch.lgamma(k + 1)
    log_p = (
        log_p - torch.lgamma(count - k + 1) + k * torch.tensor(rate).log() + (count - k) * torch.tensor(1 - rate).log()
    )
    cumulative = log_p.exp().cumsum(0)
    return int((cumulative < 0.025).sum()), int((cumulative < 0.975).sum())


def print_cost(texts: Texts, count: int) -> None:
    """CPU seconds of judging, learning and fitting, as the library grows with one sample moved to and fro."""
    size = texts[0].shape[1]
    router, library = Router(RouterConfig(), hidden_size=size, names=()), SkillLibrary(size)
    router.add_base()
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for index in range(count):
        shift = torch.randn(size, generator=generator) * 0.1
        moved = [text + shift for text in texts]
        started = time.process_time()
        judge(library, moved[:32])
        library.learn(str(index), moved, expert=str(index))
        router.add_row(str(index))
        router.set_row(str(index), *fit_row(router, library, str(index), seed=0))
        seconds.append(time.process_time() - started)
    second, last = sorted(seconds[1:4])[1], sorted(seconds[-3:])[1]
    print("\n| judge, learn and fit, CPU seconds | skills 2-4 | the last three | ratio |\n|---|---|---|---|")
    print(f"| {count} skills, {len(texts)} texts, median of three | {second:.2f} | {last:.2f} | {last / second:.2f} |")


def read_switched(read: Callable[[Tensor, Tensor], Texts], rows: dict[str, Tensor]) -> dict[str, Texts]:
    """For each language, the tokens of `SWITCH_SPAN` of its held-out rows after rows of every other language."""
    switched: dict[str, Texts] = {name: [] for name in LANGUAGES}
    for first, second in itertools.permutations(LANGUAGES, 2):
        count = len(rows[first]) // SWITCH_AFTER
        head = rows[first][: count * SWITCH_AFTER].reshape(count, -1)
        ids = torch.cat([head, rows[second][::SWITCH_AFTER][:count]], 1)
        start = head.shape[1]
        found = read(ids, torch.ones_like(ids))
        switched[second] += [text[start + SWITCH_SPAN[0] : start + SWITCH_SPAN[1]] for text in found]
    return switched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=112, help="training rows a skill")
    parser.add_argument("--held_out", type=int, default=64, help="held-out rows a skill")
    parser.add_argument("--skills", type=int, default=64, help="skills of the table of costs")
    arguments = parser.parse_args()
    model, tokenizer = load_base(arguments.model, dtype=torch.float32).eval(), load_tokenizer(arguments.model)
    embedding = model.get_input_embeddings().weight.detach()
    read = partial(features, embedding)
    train, held_out, rows = {}, {}, {}
    for name in (*LANGUAGES, *OTHERS, *PAIR):
        try:
            skill = read_skill(name, tokenizer, num_train=arguments.rows, num_held_out=arguments.held_out)
        except ValueError as error:
            if name in LANGUAGES:
                raise
            print(f"left out: {error}")
            continue
        train[name] = read(skill.train.input_ids, skill.train.attention_mask)
        held_out[name] = read(skill.held_out.input_ids, skill.held_out.attention_mask)
        rows[name] = skill.held_out.input_ids
    switched = read_switched(read, rows)
    own = write_texts(model, seed=0)
    bases: dict[str, Texts | None] = {"none": None, "sampled": read(own, torch.ones_like(own))}
    if "english" in train:
        bases["english"] = train["english"]
    for skills in (LANGUAGES, PAIR):
        if all(name in train for name in skills):
            print_routing(skills, train, held_out, switched, bases)
            print_novelty(train, held_out, skills)
    print_cost(train[LANGUAGES[0]], arguments.skills)


if __name__ == "__main__":
    main()
