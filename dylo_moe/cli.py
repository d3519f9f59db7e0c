"""The command `dylora`: parse, then one call."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

COMMANDS = {
    "train": "train several experts and their router together on one frozen model",
    "stream": "learn datasets one after another: what is new grows an expert, and nothing is forgotten",
    "submit": "train on Google Cloud: any flags of train as a job of Vertex AI that goes on when it was preempted",
    "plan": "parameters, steps, memory and checkpoint size of a training run, without running it",
    "data": "list datasets, show examples as the model sees them, check what training would be on",
    "experts": "the experts of a checkpoint: list them, remove one, fit the gate anew",
    "eval": "held-out losses with intervals, and pass@k of HumanEval and MBPP, of a trained model",
    "compare": "ours against the base, single LoRAs of equal size, and routing that is not learned; says if it wins",
    "generate": "continue a prompt with a trained model, each token coloured by the expert it used",
    "export": "an adapter for each expert with the command that serves them, or one plain model; says what that loses",
    "report": "one page about a run or a stream: losses, routing, matrix, settings; it needs no network",
}

DESCRIPTION = (
    "One frozen language model, many small LoRA experts, and a router that sends each token to the right ones."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. A user's mistake is one line on stderr and status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from . import __version__

        print(f"dylora {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(COMMANDS)}"
        print(f"dylora: there is no command {name!r}{hint}", file=sys.stderr)
        return 2
    if os.environ.get("WORLD_SIZE", "1") != "1" and name != "train":
        _tell(f"dylora {name}: this command runs in one process; start it without torchrun or accelerate launch")
        return 2
    # PEFT reads a name that Transformers is about to rename; nothing a user can act on.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    try:
        return PROGRAMS[name](rest)
    except (ValueError, OSError) as error:
        if os.environ.get("DYLORA_TRACEBACK"):
            raise
        _tell(f"dylora {name}: {error}")
        return 2
    except KeyboardInterrupt:
        _tell(f"dylora {name}: interrupted")
        return 130


def _tell(text: str) -> None:
    """Print why a command ends; in a run of several processes once, though all of them may know."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from .ranks import speaks

        if not speaks():
            return
    print(text, file=sys.stderr, flush=True)


def _until_stopped(name: str, run: Callable[[], object]) -> int:
    """Run what saves and leaves when it is asked to, or when another process of it has gone; the exit status."""
    from .stopping import RankLost, Stopped

    try:
        run()
    except Stopped as stopped:
        _tell(f"dylora {name}: {stopped}")
        return 128 + stopped.signal
    except RankLost as lost:
        if os.environ.get("DYLORA_TRACEBACK"):
            raise
        _tell(f"dylora {name}: {lost}")
        return 1
    return 0


def _overview() -> str:
    lines = [DESCRIPTION, "", "usage: dylora COMMAND [--FLAG VALUE ...]", ""]
    lines += [f"  {name:10s} {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "`dylora COMMAND --help` explains a command."])


def train(words: list[str]) -> int:
    """`dylora train`, and `python train.py`."""
    from .arguments import build_parser, parse_train

    if any(word in ("-h", "--help", "--help_all") for word in words):
        build_parser("dylora train", show_all="--help_all" in words).print_help()
        return 0
    from .train import run

    return _until_stopped("train", lambda: run(parse_train(words)))


def stream(words: list[str]) -> int:
    """`dylora stream`."""
    from .stream_arguments import build_stream_parser, parse_stream

    if any(word in ("-h", "--help", "--help_all") for word in words):
        build_stream_parser(show_all="--help_all" in words).print_help()
        return 0
    from .continual import run

    return _until_stopped("stream", lambda: run(parse_stream(words)))


def submit(words: list[str]) -> int:
    """`dylora submit`, and `python submit_full_training.py`."""
    from .cloud.request import build_submit_parser, parse_submit

    if not words or any(word in ("-h", "--help", "--help_all") for word in words):
        build_submit_parser(show_all="--help_all" in words).print_help()
        return 0
    from .cloud.command import run

    run(parse_submit(words))
    return 0


def plan(words: list[str]) -> int:
    """`dylora plan`, with the flags of `dylora train`."""
    from .plan_arguments import build_plan_parser, parse_plan

    if any(word in ("-h", "--help", "--help_all") for word in words):
        build_plan_parser(show_all="--help_all" in words).print_help()
        return 0
    from .plan import run

    run(*parse_plan(words))
    return 0


DATA_COMMANDS = {
    "list": "every dataset that has a name: size, format, licence, source",
    "show": "print examples, prompt and trained tokens in different colours",
    "check": "count rows, lengths, duplicates, padding, and overlap with HumanEval and MBPP's test split",
}


def data(words: list[str]) -> int:
    """`dylora data list`, `show` and `check`."""
    if not words or words[0] in ("-h", "--help"):
        lines = ["usage: dylora data COMMAND [NAME ...] [--FLAG VALUE ...]", ""]
        lines += [f"  {name:6s} {text}" for name, text in DATA_COMMANDS.items()]
        print("\n".join([*lines, "", "`dylora data COMMAND --help` explains a command."]))
        return 0
    command, rest = words[0], words[1:]
    if command not in DATA_COMMANDS:
        raise ValueError(f"there is no command data {command!r}; there are {', '.join(DATA_COMMANDS)}")
    if command == "list":
        parser = argparse.ArgumentParser(prog="dylora data list", description=DATA_COMMANDS["list"])
        parser.parse_args(rest)
        from .inspection import list_datasets

        list_datasets()
        return 0
    from .look_arguments import build_look_parser, parse_look

    prog = f"dylora data {command}"
    if any(word in ("-h", "--help") for word in rest):
        build_look_parser(prog).print_help()
        return 0
    request = parse_look(rest, prog=prog)
    from .inspection import check_datasets, show_dataset

    {"show": show_dataset, "check": check_datasets}[command](request.data, request.look)
    return 0


EXPERTS_COMMANDS = {
    "list": "the experts of a checkpoint in gate order, and the skills that each one knows",
    "remove": "write the checkpoint without one expert, its gate row and its skills; the others stay bit for bit",
    "refit": "fit all gate rows anew against the skill library: show what changes, and write it where --output says",
}


def experts(words: list[str]) -> int:
    """`dylora experts list`, `remove` and `refit`."""
    if not words or words[0] in ("-h", "--help"):
        lines = ["usage: dylora experts COMMAND CHECKPOINT ...", ""]
        lines += [f"  {name:7s} {text}" for name, text in EXPERTS_COMMANDS.items()]
        print("\n".join([*lines, "", "`dylora experts COMMAND --help` explains a command."]))
        return 0
    command, rest = words[0], words[1:]
    if command not in EXPERTS_COMMANDS:
        raise ValueError(f"there is no command experts {command!r}; there are {', '.join(EXPERTS_COMMANDS)}")
    prog = f"dylora experts {command}"
    parser = argparse.ArgumentParser(prog=prog, allow_abbrev=False, description=EXPERTS_COMMANDS[command])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint folder (the one that holds dylora.json)")
    if command == "remove":
        parser.add_argument("name", metavar="EXPERT", help="the expert that goes")
        parser.add_argument("--output", required=True, help="a new folder for the checkpoint without it")
    if command == "refit":
        parser.add_argument("--output", help="a new folder for the refitted checkpoint; without it nothing is written")
        parser.add_argument("--seed", type=int, default=0, help="of the draws from the skills' statistics")
    arguments = parser.parse_args(rest)
    from .experts import list_experts, refit, remove_expert

    calls: dict[str, Callable[..., None]] = {"list": list_experts, "remove": remove_expert, "refit": refit}
    calls[command](**vars(arguments))
    return 0


def evaluate(words: list[str]) -> int:
    """`dylora eval`."""
    from .evaluate.eval_arguments import build_eval_parser, parse_eval

    if not words or words[0] in ("-h", "--help"):
        build_eval_parser().print_help()
        return 0
    request = parse_eval(words)
    from .evaluate.command import run

    run(request)
    return 0


def compare(words: list[str]) -> int:
    """`dylora compare`."""
    from .compare_arguments import build_compare_parser, parse_compare

    if any(word in ("-h", "--help", "--help_all") for word in words):
        build_compare_parser(show_all="--help_all" in words).print_help()
        return 0
    from .compare import run

    return _until_stopped("compare", lambda: run(parse_compare(words)))


def generate(words: list[str]) -> int:
    """`dylora generate`."""
    parser = argparse.ArgumentParser(
        prog="dylora generate",
        allow_abbrev=False,
        description="Continue a prompt with a trained model. Each token is coloured by the expert that processed it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint folder (the one that holds dylora.json)")
    parser.add_argument("--prompt", required=True, help="what to ask, or with --raw the text to continue")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without a chat template")
    parser.add_argument("--expert", help="send every token to this expert; base: to the unchanged model")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest continuation, in tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy; above: sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    arguments = parser.parse_args(words)
    from .generate import run

    run(**vars(arguments))
    return 0


def export(words: list[str]) -> int:
    """`dylora export`."""
    from .export.export_arguments import build_export_parser, parse_export

    if not words or any(word in ("-h", "--help") for word in words):
        build_export_parser().print_help()
        return 0
    request = parse_export(words)
    from .export.command import run

    run(request)
    return 0


def report(words: list[str]) -> int:
    """`dylora report`."""
    parser = argparse.ArgumentParser(prog="dylora report", allow_abbrev=False, description=COMMANDS["report"])
    parser.add_argument("run", metavar="RUN", help="the folder of a run or a stream, finished or not")
    parser.add_argument("--output", help="the page to write; without it, report.html in that folder")
    arguments = parser.parse_args(words)
    from .report import run

    print(run(arguments.run, arguments.output))
    return 0


PROGRAMS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "stream": stream,
    "submit": submit,
    "plan": plan,
    "data": data,
    "experts": experts,
    "eval": evaluate,
    "compare": compare,
    "generate": generate,
    "export": export,
    "report": report,
}

if __name__ == "__main__":
    sys.exit(main())
