"""On which language models of the installed Transformers does every law hold?

Every causal language model, and every model that also reads images, is made tiny and random and put through the laws of
family_laws.py, in a process of its own. What was tried is kept in a file and not tried again until it is named with
--only, or --output names another file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from family_laws import LATE, LINEARS, NOTE, PASS, REFUSED, TRACEBACK, UNTRIED, WRONG, try_family
from tiny_configs import OVERRIDES, families, wrappers

WORST_FIRST = [TRACEBACK, WRONG, LATE, REFUSED, UNTRIED, PASS]


def entries() -> dict[str, tuple[str, dict[str, Any]]]:
    """What is tried: a title, the family and the changes to its config. An encoder that can be a decoder is both."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for family in families():
        found[family] = (family, {})
        fields = {field.name: field.default for field in dataclasses.fields(transformers.CONFIG_MAPPING[family])}
        if fields.get("is_decoder") is False and "is_decoder" not in OVERRIDES.get(family, {}):
            found[f"{family}, is_decoder"] = (family, {"is_decoder": True})
    for family in wrappers():
        found[f"{family}, images and text"] = (family, {"wrapper": True})
    return found


def tried(title: str, pipe: Any) -> None:
    """Send a family's outcomes one by one, as a process of its own."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    family, changes = entries()[title]
    for outcome in try_family(family, **changes):
        pipe.send(dataclasses.asdict(outcome))
    pipe.close()


def run(title: str, *, timeout_seconds: float) -> dict[str, Any]:
    """Try one family in a process that is ended where it takes too long, and may die."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=tried, args=(title, theirs))
    start, outcomes = time.monotonic(), []
    process.start()
    theirs.close()
    try:
        while ours.poll(max(0.0, start + timeout_seconds - time.monotonic())):
            outcomes.append(ours.recv())
        process.kill()
        outcomes.append({"law": "time", "kind": UNTRIED, "message": f"more than {timeout_seconds:.0f} s"})
    except EOFError:
        pass
    process.join()
    if process.exitcode and not any(outcome["law"] == "time" for outcome in outcomes):
        outcomes.append({"law": "process", "kind": TRACEBACK, "message": f"ended with {process.exitcode}"})
    return {"outcomes": outcomes, "seconds": round(time.monotonic() - start, 1)}


def verdict(result: dict[str, Any]) -> str:
    """The worst of a family's outcomes."""
    return min((outcome["kind"] for outcome in result["outcomes"]), key=WORST_FIRST.index)


def said(result: dict[str, Any]) -> Iterator[str]:
    """What there is to say of a family; laws that fail alike are named together."""
    laws: dict[str, list[str]] = {}
    for outcome in result["outcomes"]:
        if outcome["message"] and outcome["law"] != LINEARS:
            laws.setdefault(outcome["message"], []).append(outcome["law"])
    for message, names in laws.items():
        yield message if names in ([NOTE], ["base"], ["from_base"]) else f"{', '.join(names)}: {message}"


def row(title: str, result: dict[str, Any]) -> str:
    """A family's line of the table."""
    linears = next((outcome["message"] for outcome in result["outcomes"] if outcome["law"] == LINEARS), "")
    text = "; ".join(said(result)).replace("|", "\\|")
    return f"| {title} | {verdict(result)} | {linears} | {text} |"


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line a family, the worst first."""
    lines = ["| family | verdict | linears with experts | what there is to say |", "|---|---|---|---|"]
    return "\n".join(
        [
            *lines,
            *(
                row(title, results[title])
                for title in sorted(results, key=lambda title: (WORST_FIRST.index(verdict(results[title])), title))
            ),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("families.json"), help="what was found, and is kept")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these families, again where they were tried")
    parser.add_argument("--timeout_seconds", type=float, default=120.0, help="for one family")
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    known = entries()
    unknown = [name for name in arguments.only or () if name not in known]
    if unknown:
        parser.error(f"--only {unknown[0]}: the families are {', '.join(known)}")
    for title in arguments.only or [title for title in known if title not in results]:
        results[title] = run(title, timeout_seconds=arguments.timeout_seconds)
        print(f"{title}: {verdict(results[title])}, {results[title]['seconds']} s", flush=True)
        partial = arguments.output.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        os.replace(partial, arguments.output)
    print(table({title: results[title] for title in arguments.only or known if title in results}))
    counts = [verdict(result) for result in results.values()]
    print("\n" + ", ".join(f"{counts.count(kind)} {kind}" for kind in reversed(WORST_FIRST) if kind in counts))


if __name__ == "__main__":
    main()
