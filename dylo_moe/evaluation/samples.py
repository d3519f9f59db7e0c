"""Files of samples and verdicts: one JSON object per line, appended at once, so that a killed run can be resumed."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylo_moe.evaluation.sandbox.sandbox import Verdict

STOP, END, LENGTH = FINISHES = ("stop", "end", "length")
"""Why an answer ended: by a stop sequence, an end token, or the limit on new tokens."""


class Completion(NamedTuple):
    """One answer of a model. The settings determine all of it but the time."""

    task_id: str
    sample: int
    """The number of the sample among those of its task, from 0 to num_samples - 1."""
    completion: str
    """The generated text without end tokens, not yet cut at a stop sequence."""
    solution: str
    """The whole program that the answer amounts to."""
    tokens: int
    """The number of generated tokens, up to and including the end token or the one that completed the stop."""
    finish: str
    """Why the answer ended, one of FINISHES."""
    experts: dict[str, float]
    """The share of these tokens that each expert generated; "base" stands for the base alone."""
    steps: int
    """The number of decoding steps of its batch, in which rows that have ended wait for the others."""
    seconds: float
    """The time that its batch took, divided by the number of the batch's rows."""


class SampleFile:
    """The samples of one benchmark in one decoding, in the fixed order of the run.

    Only whole batches are kept. A batch is always generated together, so the samples do not depend on where a run was
    interrupted.

    Args:
        path: the file, which need not exist.
        keys: (task_id, sample) of all samples that the run generates, in order.
        batch_size: the number of samples of a batch; the last batch may have fewer.

    Raises:
        ValueError: for a file that holds samples of another run.
    """

    def __init__(self, path: Path, keys: Sequence[tuple[str, int]], *, batch_size: int) -> None:
        self.path, self.keys, self.batch_size = path, list(keys), batch_size
        lines, whole, self.num_dropped = read_lines(path)
        self.samples = [Completion(**line) for line in lines]
        found = [(sample.task_id, sample.sample) for sample in self.samples]
        if found != self.keys[: len(found)]:
            raise ValueError(f"{path} holds samples of another run, or in another order; give a new --output_dir")
        if len(found) < len(self.keys):
            spare = len(found) % batch_size
            self.num_dropped += spare
            self.samples = self.samples[: len(found) - spare]
        kept = sum(whole[: len(self.samples)])
        if path.exists() and path.stat().st_size != kept:
            os.truncate(path, kept)

    @property
    def batches(self) -> list[tuple[int, list[tuple[str, int]]]]:
        """The batches that are still missing: (number of the batch in the whole run, its keys)."""
        starts = range(0, len(self.keys), self.batch_size)
        return [
            (number, self.keys[start : start + self.batch_size])
            for number, start in enumerate(starts)
            if start >= len(self.samples)
        ]

    def append(self, batch: Sequence[Completion]) -> None:
        """Append one batch to the file."""
        append_lines(self.path, [sample._asdict() for sample in batch])
        self.samples.extend(batch)


class VerdictFile:
    """The verdicts on samples, in the order in which they came. A verdict counts only for the program that was judged.

    Args:
        path: the file, which need not exist. Several threads may append to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        lines, whole, self.num_dropped = read_lines(path)
        if self.num_dropped:
            os.truncate(path, sum(whole))
        self._verdicts = {
            (line["task_id"], line["sample"], line["program"]): Verdict(line["passed"], line["result"])
            for line in lines
        }

    def of(self, sample: Completion) -> Verdict | None:
        """The verdict on a sample; None if there is none yet."""
        return self._verdicts.get((sample.task_id, sample.sample, program_hash(sample)))

    def append(self, sample: Completion, verdict: Verdict) -> None:
        """Append one verdict to the file."""
        key = (sample.task_id, sample.sample, program_hash(sample))
        line = {"task_id": sample.task_id, "sample": sample.sample, **verdict._asdict(), "program": key[2]}
        with self._lock:
            append_lines(self.path, [line])
            self._verdicts[key] = verdict


def program_hash(sample: Completion) -> str:
    """A short hash of a sample's program."""
    return hashlib.sha256(sample.solution.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int], int]:
    """Read the JSON objects of a file, up to the first line that is incomplete.

    Returns:
        The objects, the length of each one's line in bytes, and the number of lines after them, which are dropped.
    """
    if not path.exists():
        return [], [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    objects: list[dict[str, Any]] = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(value, dict):
            break
        objects.append(value)
    return objects, [len(line) for line in lines[: len(objects)]], len(lines) - len(objects)


def append_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Append lines in one write, and flush them to the disk."""
    text = "".join(json.dumps(value) + "\n" for value in objects)
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
