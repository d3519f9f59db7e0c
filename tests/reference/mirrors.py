"""A local mirror of every hub dataset: file names, columns and types as on the hub, rows written for this project.

Each dataset has one row that cannot be trained on, and one that repeats another.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 30
"""Good rows of each dataset that has one split."""


def write_mirror(folder: Path) -> Path:
    """Everything, under the names of the catalog."""
    for name, write in WRITERS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "README.md").write_text(f"---\nlicense: other\n{CARDS.get(name, '')}---\n")
        (folder / name / ".gitattributes").write_text("*.json filter=lfs\n")
        write(folder / name)
    return folder


def task(number: int, kind: str) -> str:
    return f"{kind} task {number}: write a function that adds {number} to every {kind} item of the {kind} list"


def answer(number: int, kind: str) -> str:
    return f"def {kind}_{number}(items):\n    return [item + {number} for item in items]"


def with_faults(rows: list[dict], column: str) -> list[dict]:
    """And one whose answer is empty, and one twice."""
    return [*rows, {**rows[0], column: "  "}, rows[1]]


def _array(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _parquet(path: Path, rows: list[dict], schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path)


def _alpaca(kind: str, *, with_input: bool = True) -> list[dict]:
    rows = [
        {
            "instruction": task(number, kind),
            **({"input": f"[{number}]" if number % 2 else ""} if with_input else {}),
            "output": answer(number, kind),
        }
        for number in range(ROWS)
    ]
    return with_faults(rows, "output")


def code_alpaca(folder: Path) -> None:
    _array(folder / "code_alpaca_20k.json", _alpaca("alpaca"))


def mbpp(folder: Path) -> None:
    schema = pa.schema(
        [
            ("task_id", pa.int32()),
            ("text", pa.string()),
            ("code", pa.string()),
            ("test_list", pa.list_(pa.string())),
            ("test_setup_code", pa.string()),
            ("challenge_test_list", pa.list_(pa.string())),
        ]
    )
    for config in ("full", "sanitized"):  # the other one lies beside, with other tasks
        splits = {"prompt": range(1, 4), "test": range(11, 31), "validation": range(511, 519), "train": range(601, 631)}
        for split, numbers in splits.items():
            rows = [
                {
                    "task_id": number,
                    "text": f"{config}: {task(number, 'mbpp')}",
                    "code": answer(number, "mbpp").replace("\n", "\r\n"),
                    "test_list": [f"assert mbpp_{number}([1]) == [{number + 1}]", f"assert mbpp_{number}([]) == []"],
                    "test_setup_code": "",
                    "challenge_test_list": [],
                }
                for number in numbers
            ]
            if split == "train":
                rows = with_faults(rows, "code")
            _parquet(folder / config / f"{split}-00000-of-00001.parquet", rows, schema)


def evol_instruct(folder: Path) -> None:
    _array(folder / "EvolInstruct-Code-80k.json", _alpaca("evol", with_input=False))


def code_feedback(folder: Path) -> None:
    rows = [
        {"query": task(number, "feedback"), "answer": answer(number, "feedback"), "resource": "own", "lang": "python"}
        for number in range(ROWS)
    ]
    _lines(folder / "CodeFeedback-Filtered-Instruction.jsonl", with_faults(rows, "answer"))


def python_codes_25k(folder: Path) -> None:
    rows = [{**row, "text": row["instruction"] + row["output"]} for row in _alpaca("codes")]
    _array(folder / "python-codes-25k.json", rows)
    _lines(folder / "python-codes-25k.jsonl", rows)


def python_code_instructions_18k(folder: Path) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("instruction", "input", "output", "prompt")])
    rows = [{**row, "prompt": "Below is: " + row["instruction"]} for row in _alpaca("instructions")]
    _parquet(folder / "data" / "train-00000-of-00001-8b6e212f3e1ece96.parquet", rows, schema)


def python_code_23k_sharegpt(folder: Path) -> None:
    rows = []
    for number in range(ROWS):
        turns = [("human", task(number, "share")), ("gpt", answer(number, "share"))]
        if number % 3 == 0:
            turns += [("human", f"And why {number}?"), ("gpt", f"Because it was asked for, {number} times.")]
        rows.append({"id": f"x_{number}", "conversations": [{"from": who, "value": what} for who, what in turns]})
    rows += [{"id": "none", "conversations": []}, {**rows[1], "id": "again"}]
    _array(folder / "Python-Code-23k-ShareGPT.json", rows)


def humaneval(folder: Path) -> None:
    names = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    rows = [
        {
            "task_id": f"HumanEval/{number}",
            "prompt": f'def own_{number}(items):\n    """Give back every item of a list of numbers with {number} added '
            f'to each of them.\n    >>> own_{number}([1])\n    [{number + 1}]\n    """\n',
            "canonical_solution": f"    return [item + {number} for item in items]\n",
            "test": f"def check(candidate):\n    assert candidate([1]) == [{number + 1}]\n",
            "entry_point": f"own_{number}",
        }
        for number in range(5)
    ]
    schema = pa.schema([(name, pa.string()) for name in names])
    _parquet(folder / "openai_humaneval" / "test-00000-of-00001.parquet", rows, schema)


def _card(configs: dict[str, list[str]]) -> str:
    """The lines of a card that say which files are whose."""
    lines = ["configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    return "\n".join(lines) + "\n"


_MBPP_SPLITS = ["train", "test", "validation", "prompt"]
CARDS = {
    "mbpp": _card({"full": _MBPP_SPLITS, "sanitized": _MBPP_SPLITS}),
    "humaneval": _card({"openai_humaneval": ["test"]}),
}

WRITERS = {
    writer.__name__: writer
    for writer in (
        code_alpaca,
        mbpp,
        evol_instruct,
        code_feedback,
        python_codes_25k,
        python_code_instructions_18k,
        python_code_23k_sharegpt,
        humaneval,
    )
}
