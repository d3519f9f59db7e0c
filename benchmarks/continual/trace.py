"""Seven tasks of TRACE one after another: what is kept, what is forgotten, and what the alternatives make of it.

    python benchmarks/continual/trace.py --data FOLDER --output FOLDER [--only METHOD ...] [--rows 100] [--orders 2]
        [--seeds 0 1]

TRACE: Wang et al. 2023, arXiv:2310.06762. FOLDER has TASK/train.jsonl and TASK/test.jsonl for C-STANCE, FOMC, Py150,
ScienceQA, NumGLUE-cm, NumGLUE-ds and 20Minuten (MeetingBank is left out), each line with `prompt` and `answer`. All
methods see the same rows for the same number of tokens, with the same two-phase rate, and are judged by the same test
rows, by each task's own metric and in nats per answer token:

  base           the model before it learned anything
  in_turn        one LoRA trained on the tasks in turn
  replay_1       the same; 1 % of each stage's rows are replaced by rows of earlier tasks (at least one row)
  replay_5       the same with 5 %
  o_lora         a new LoRA for each task, orthogonal to the earlier ones, all added up (arXiv:2310.14152)
  joint          one LoRA of the size of all experts together, on all tasks at once
  oracle         our experts, the right one chosen by somebody who knows: the ceiling
  any_ssr        our experts behind Any-SSR's closed-form router, decided on the prompt (arXiv:2503.13575)
  ours_sequence  `model.add_skill`, `granularity="sequence"`: the prompt decides
  ours_response  `granularity="response"`: the prompt decides, and the base reads it; its experts learned only to answer
  oracle_response  the same, the right expert chosen by somebody who knows
  ours_token     the same, each token on its own
  top1_token     the same with one expert for each token, where the gate is unsure too
  frozen_token, frozen_sequence   the same two with gate rows that stay as they were fitted, one expert for each token

Ours, the oracle and any_ssr share their experts, trained once a seed; the two with `response` have others. Each
stage of each run leaves a file and is not done again, so the command can be interrupted and run again. In the end it
prints the tables of all runs in the output folder and writes summary.json. It needs the package `rapidfuzz`, which
`make lint` adds to .venv.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from trace_judging import Judge
from trace_methods import METHODS as PLAIN
from trace_methods import Method, Run, Setting
from trace_ours import OURS
from trace_tables import print_tables, summary
from trace_tasks import OTHER_ORDER, TASKS, Task, read_task

from dylo_moe.base.loading import load_tokenizer
from dylo_moe.utils.atomic_files import write_whole

METHODS: dict[str, Method] = {**OURS, **PLAIN}

ORDER_MATTERS = {"in_turn", "replay_1", "replay_5", "o_lora", *OURS} - {"oracle", "oracle_response"}

RUN_FIRST = (
    "oracle", "ours_sequence", "any_ssr", "ours_token", "base", "in_turn", "replay_5", "joint", "o_lora", "replay_1",
    "top1_token", "frozen_token", "frozen_sequence", "oracle_response", "ours_response",
)  # fmt: skip
"""What matters most comes first."""

OF_A_RUN = ("model", "rows", "test_rows", "matrix_rows", "max_length", "learning_rate", "dtype")
"""The arguments that a run is refused for, where they are not those that it was begun with."""


def run(method: str, place: int, order: tuple[str, ...], seed: int, setting: Setting, settings: dict[str, Any]) -> None:
    """All stages of a run that are not there yet."""
    folder = setting.folder / "runs" / f"{method}-order{place}-seed{seed}"
    begin(folder / "run.json", {"method": method, "order": list(order), "seed": seed, "settings": settings})
    num_stages = len(order) if method in ORDER_MATTERS else 1
    done = len(list(folder.glob("stage-*.json")))
    if done == num_stages:
        return
    start = time.perf_counter()
    stages = METHODS[method](Run(setting, order, seed, folder, done))
    for index, stage in enumerate(stages, start=done):
        stage["seconds"] = round(time.perf_counter() - start, 1)
        text = json.dumps(stage, indent=1, ensure_ascii=False)
        write_whole(folder / f"stage-{index}.json", text.encode())
        print(f"{folder.name}: stage {index + 1} of {num_stages}, {stage['seconds']} s", flush=True)
        start = time.perf_counter()


def begin(path: Path, about: dict[str, Any]) -> None:
    """Note what is begun, or end the program where the file says that it was begun otherwise."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(about, indent=1).encode())
    elif json.loads(path.read_text()) != about:
        raise SystemExit(f"{path} says that this was begun with other settings; choose another --output or delete it")


def read_tasks(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Task]:
    """All tasks; prints what was too long."""
    tasks = {}
    for name in TASKS:
        tasks[name] = read_task(
            arguments.data,
            name,
            tokenizer,
            num_train=arguments.rows,
            num_test=arguments.test_rows,
            max_length=arguments.max_length,
        )
        tokens = int(tasks[name].train.attention_mask.sum())
        cut, num_test = tasks[name].cut, len(tasks[name].answers)
        print(
            f"{name}: {tokens} training tokens in {arguments.rows} rows; cut to {arguments.max_length} tokens: "
            f"{cut['train']} of them, {cut['test']} of {num_test} test rows",
            flush=True,
        )
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(RUN_FIRST), metavar="METHOD")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=100, help="training rows of each task")
    parser.add_argument("--test_rows", type=int, default=100, help="the most test rows of each task")
    parser.add_argument("--matrix_rows", type=int, default=16, help="test rows for the losses after each stage")
    parser.add_argument("--max_length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--orders", type=int, choices=(1, 2), default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="the high one of the two")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    parser.add_argument("--tables", action="store_true", help="only print the tables of what is there")
    arguments = parser.parse_args()
    if not arguments.tables:
        run_all(arguments)
    runs = arguments.output / "runs"
    records = [record for folder in sorted(runs.iterdir()) if (record := read_run(folder))["stages"]]
    records.sort(key=lambda record: (list(RUN_FIRST).index(record["method"]), record["seed"], record["order"]))
    print_tables(records)
    write_whole(arguments.output / "summary.json", json.dumps(summary(records), indent=1).encode())


def run_all(arguments: argparse.Namespace) -> None:
    """Every run of the arguments that can differ from one before, the first seed and order before the others."""
    tokenizer = load_tokenizer(arguments.model)
    tasks = read_tasks(arguments, tokenizer)
    judge = Judge(tasks, tokenizer, num_matrix_rows=arguments.matrix_rows)
    setting = Setting(arguments.model, tasks, judge, arguments.learning_rate, arguments.output, arguments.dtype)
    settings = {name: getattr(arguments, name) for name in OF_A_RUN}
    begin(arguments.output / "settings.json", settings)  # which the experts there were trained with
    orders = (TASKS, OTHER_ORDER)[: arguments.orders]
    for seed in arguments.seeds:
        for place in range(len(orders)):
            for method in arguments.only:
                is_first_seed = seed == arguments.seeds[0]
                if (place == 0 or method in ORDER_MATTERS) and (is_first_seed or method != "base"):
                    run(method, place, orders[place], seed, setting, settings)


def read_run(folder: Path) -> dict[str, Any]:
    """What a run was begun with, and its stages so far."""
    record = json.loads((folder / "run.json").read_text())
    places = range(len(list(folder.glob("stage-*.json"))))
    return record | {"stages": [json.loads((folder / f"stage-{place}.json").read_text()) for place in places]}


if __name__ == "__main__":
    main()
