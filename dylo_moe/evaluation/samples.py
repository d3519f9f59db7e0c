"""Samples and verdicts on disk: one JSON object a line, appended as they come, so that a killed run goes on."""

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
"""Why an answer is over: a stop sequence, an end token, or the bound on new tokens."""


class Completion(NamedTuple):
    """One answer of a model. All but the time follows from the settings."""

    task_id: str
    sample: int
    """0 to num_samples - 1 of its task."""
    completion: str
    """As generated, end tokens aside; not cut at a stop."""
    solution: str
    """The whole program that is in it."""
    tokens: int
    """Generated, the end token or the one that completed the stop included."""
    finish: str
    """One of FINISHES."""
    experts: dict[str, float]
    """The share of these tokens that each expert wrote; "base": the base alone."""
    steps: int
    """Decoding steps of its batch, in which rows that are over wait for the others."""
    seconds: float
    """Of its batch, divided by the batch's rows."""


class SampleFile:
    """The samples of one benchmark in one decoding, in the fixed order of the run.

    Only whole batches are kept: a batch is generated as one, so that what a run writes does not depend on where it was
    interrupted.

    Args:
        path: the file; need not be there.
        keys: (task_id, sample) of all samples that are to be, in order.
        batch_size: samples a batch; the last may have fewer.

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
        """What is still to be generated: (number of the batch in the whole run, its keys)."""
        starts = range(0, len(self.keys), self.batch_size)
        return [
            (number, self.keys[start : start + self.batch_size])
            for number, start in enumerate(starts)
            if start >= len(self.samples)
        ]

    def append(self, batch: Sequence[Completion]) -> None:
        """Keep one batch."""
        append_lines(self.path, [sample._asdict() for sample in batch])
        self.samples.extend(batch)


class VerdictFile:
    """The verdicts on samples, in the order in which they came; one counts only for the program that it was about.

    Args:
        path: the file; need not be there. May be appended to from several threads.
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
        """The verdict on a sample; None where there is none yet."""
        return self._verdicts.get((sample.task_id, sample.sample, program_hash(sample)))

    def append(self, sample: Completion, verdict: Verdict) -> None:
        """Keep one verdict."""
        key = (sample.task_id, sample.sample, program_hash(sample))
        line = {"task_id": sample.task_id, "sample": sample.sample, **verdict._asdict(), "program": key[2]}
        with self._lock:
            append_lines(self.path, [line])
            self._verdicts[key] = verdict


def program_hash(sample: Completion) -> str:
    """Of a sample's program."""
    return hashlib.sha256(sample.solution.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int], int]:
    """The JSON objects of a file, up to the first line that is not whole.

    Returns:
        The objects, the bytes of the line of each, and how many lines behind them were dropped.
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
    """Write lines in one go, through to the disk."""
    text = "".join(json.dumps(value) + "\n" for value in objects)
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
