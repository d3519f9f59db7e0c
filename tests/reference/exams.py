"""A tiny checkpoint, and benchmarks of our own in a mirror, some of whose tasks it must pass and some fail."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from peft import LoraConfig

from dylo_moe import DyLoRAMoE, RouterConfig

from .runs import tiny_run_folder
from .texts import write_rows
from .tiny import LORA, scramble

NUM_TASKS = 5


def checkpoint_and_mirror(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of two experts whose words are "w0" to "w89", and the mirror `exams`."""
    tiny_run_folder(folder)
    model = DyLoRAMoE.from_base(
        str(folder / "base"), num_experts=2, lora=LoraConfig(**LORA), router=RouterConfig(router_half_life=1.5)
    )
    scramble(model).save_pretrained(str(folder / "checkpoint"))
    exams(folder / "mirror")
    return folder / "checkpoint", folder / "mirror"


def exams(folder: Path, *, num_tasks: int = NUM_TASKS) -> None:
    """HumanEval: each prompt is a function that is done and ends in a comment, which any words go on with; every second
    one is wrong. MBPP: the columns of the hub, its splits test and prompt."""
    rows = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f"import math\n\n\ndef own_{number}(xs):\n    return [x + {number} for x in xs]\n    # ",
            "canonical_solution": "done",
            "test": f"def check(candidate):\n    assert candidate([1]) == [{number + 1 + number % 2}]\n",
            "entry_point": f"own_{number}",
        }
        for number in range(num_tasks)
    ]
    write_rows(folder / "humaneval" / "test.jsonl", rows)
    for split, numbers in {"prompt": range(1, 11), "test": range(11, 11 + num_tasks)}.items():
        tasks = [
            {
                "task_id": number,
                "text": f"Write a function to add {number}.",
                "code": f"def add_{number}(x):\r\n    return x + {number}",
                "test_list": [
                    f"assert add_{number}(1) == {number + 1}",
                    f"assert set([add_{number}(0)]) == {{{number}}}",
                ],
                "test_setup_code": "",
                "challenge_test_list": [],
            }
            for number in numbers
        ]
        path = folder / "mbpp" / "full" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(tasks), path)
    for split in ("train", "validation"):
        (folder / "mbpp" / "full" / f"{split}-00000-of-00001.parquet").write_bytes(path.read_bytes())


def lines_of(path: Path) -> list[dict]:
    """The JSON lines of a file without the time they took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
