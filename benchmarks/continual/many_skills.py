"""Sixty-four skills learned one after another: what growth costs, and what routing still finds.

    python benchmarks/continual/many_skills.py --output FOLDER [--rows 16] [--sample 64] [--held_out 8]

The skills are made: eight real kinds of text (skills.py), each in eight spellings that can be undone (SPELLINGS), in
an order of chance. Each is learned as `dylora stream --known_skill grow` would: `model.add_skill`, then a few rows for
the new expert alone. After 4, 16 and 64 skills the script measures the CPU seconds of a growth, the memory of experts,
library and gate, the share of held-out tokens that are routed to their own expert, and the gain that is kept: the
base's loss less the routed one, as a share of the base's loss less that of the skill's own expert.

The trained experts and their losses are kept in the folder, for they do not depend on the gate. So the command can be
interrupted and run again, and another gate is measured without training: delete FOLDER/measured.json. With `--rows 0`
nothing is trained, and growth, memory and routing are measured alone, in a few minutes. One seed, one thread; the first
run takes about an hour on a core that nothing else uses.
"""

from __future__ import annotations

import argparse
import codecs
import json
import random
import re
import string
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from continual_baselines import BATCH_ROWS, RANK, lora_config, loss_of, train
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from skills import LANGUAGES, OTHERS, Rows, Skill, read_skill
from torch import Tensor

from dylo_moe import DyLoRAMoE
from dylo_moe.base.loading import load_base, load_tokenizer
from dylo_moe.continual.config import GROW, GrowthConfig
from dylo_moe.model.saving import save_tensors

KINDS = (*LANGUAGES, *OTHERS)

MEASURED_AT = (4, 16, 64)

SEED = 0


def _swapped(first: str, second: str) -> Callable[[str], str]:
    """The spelling in which each letter of `first` stands for its partner in `second`, and the other way round."""
    table = str.maketrans(first + second, second + first)
    return lambda text: text.translate(table)


def _doubled(text: str) -> str:
    return re.sub("[A-Za-z]", r"\g<0>\g<0>", text)


def _mirrored(text: str) -> str:
    return re.sub("[A-Za-z]+", lambda word: word[0][::-1], text)


def _rot13(text: str) -> str:
    return codecs.encode(text, "rot13")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "rot13": _rot13,
    "atbash": _swapped(string.ascii_letters, string.ascii_lowercase[::-1] + string.ascii_uppercase[::-1]),
    "case": _swapped(string.ascii_lowercase, string.ascii_uppercase),
    "mirrored": _mirrored,
    "doubled": _doubled,
    "digits": _swapped("aeiostlgbz", "4310579682"),
    "vowels": lambda text: text.translate(str.maketrans("aeiouAEIOU", "eiouaEIOUA")),
}
"""The spellings of a text, each of which can be undone: as it is; letters moved by 13; the alphabet backwards; capitals
for small letters; each word backwards; each letter twice; digits for ten letters; each vowel the next one."""


class Folder:
    """The files of a run, which another run with the same settings reads instead of computing them again."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        (path / "experts").mkdir(parents=True, exist_ok=True)
        if self.read("settings", settings) != settings:
            raise SystemExit(f"{path} was made with other settings; choose another --output or delete it")
        self.write("settings", settings)

    def read(self, name: str, default: Any) -> Any:
        """What lies in a file, or the default where there is none."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else default

    def write(self, name: str, value: Any) -> None:
        """Write a file, whole or not at all."""
        aside = self.path / f"{name}.aside"
        aside.write_text(json.dumps(value, indent=1))
        aside.rename(self.path / f"{name}.json")

    def expert(self, name: str) -> Path:
        """Where a trained expert lies."""
        return self.path / "experts" / f"{name}.safetensors"


def names_of(count: int) -> list[str]:
    """The first skills of the order, each `KIND-SPELLING`."""
    names = [f"{kind}-{spelling}" for kind in KINDS for spelling in SPELLINGS]
    return random.Random(SEED).sample(names, len(names))[:count]


def learn(model: DyLoRAMoE, skill: Skill, folder: Folder, *, num_rows: int) -> dict[str, Any]:
    """Add a skill to the model and train its expert (unless `num_rows` is 0), or take the trained one; returns what was
    decided, and the growth's seconds of CPU time."""
    sample = [{"input_ids": ids} for ids in skill.train.input_ids.split(BATCH_ROWS)]
    start = time.process_time()
    decision = model.add_skill(skill.name, sample, seed=SEED)
    seconds, path = time.process_time() - start, folder.expert(skill.name)
    if path.exists():
        set_peft_model_state_dict(model, load_file(path), adapter_name=skill.name)
    elif num_rows:
        with model.route_to(skill.name):
            train(model, skill.train.take(slice(num_rows)), high_rate=2e-3, seed=SEED)
        save_tensors(model.experts.state(skill.name), path)
    model.mature(skill.name)
    return {"novel": decision.novel, "nearest": decision.nearest, "score": decision.score, "seconds": seconds}


def alone(model: DyLoRAMoE, skill: Skill, folder: Folder) -> tuple[float, float]:
    """Loss of a skill's held-out text by the base, and by its own expert for every token."""
    known = folder.read("alone", {})
    if skill.name not in known:
        found = []
        for member in (None, skill.name):
            with model.route_to(member):
                found.append(loss_of(model, skill.held_out))
        folder.write("alone", known | {skill.name: found})
        return found[0], found[1]
    base, own = known[skill.name]
    return base, own


@torch.no_grad()
def share_right(model: DyLoRAMoE, rows: Rows, expert: str) -> float:
    """Share of the rows' tokens whose first choice is `expert`."""
    model.eval()
    chosen = []
    for ids in rows.input_ids.split(BATCH_ROWS):
        routing = model.route(ids)
        chosen.append(routing.weights.argmax(-1) == routing.names.index(expert))
    return float(torch.cat(chosen).float().mean())


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """What tensors take in memory."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(model: DyLoRAMoE, skills: Sequence[Skill], folder: Folder, *, with_losses: bool) -> dict[str, Any]:
    """Routing, losses and memory of the model as it is, over the skills that it has learned."""
    experts = [parameter for expert in model.experts for parameter in model.experts.parameters(expert.name)]
    record: dict[str, Any] = {
        "bytes": {
            "experts": num_bytes(experts),
            "library": num_bytes(list(model.library.tensors().values())),
            "gate": num_bytes(list(model.router.state_dict().values())),
        },
        "rss": psutil.Process().memory_info().rss,
        "confusable": [pair._asdict() for pair in model.growth.confusable()],
        "skills": {},
    }
    for skill in skills:
        found = record["skills"][skill.name] = {"right": share_right(model, skill.held_out, skill.name)}
        if with_losses:
            found["base"], found["own"] = alone(model, skill, folder)
            found["routed"] = loss_of(model, skill.held_out)
    return record


def run(arguments: argparse.Namespace, folder: Folder) -> None:
    """Learn the skills in turn, and measure at each of `MEASURED_AT`."""
    tokenizer = load_tokenizer(arguments.model)
    base = load_base(arguments.model, dtype=arguments.dtype)
    model = DyLoRAMoE.from_base(
        base, lora=lora_config(RANK), allow_expert_growth=True, growth=GrowthConfig(known_skill=GROW)
    )
    skills: list[Skill] = []
    result: dict[str, Any] = {"growth": {}, "at": {}}
    for name in names_of(arguments.skills):
        kind, spelling = name.split("-")
        read = read_skill(
            kind,
            tokenizer,
            num_train=arguments.sample,
            num_held_out=arguments.held_out,
            transform=SPELLINGS[spelling],
        )
        skills.append(read._replace(name=name))
        result["growth"][name] = learn(model, skills[-1], folder, num_rows=arguments.rows)
        losses = f", base and own {alone(model, skills[-1], folder)}" if arguments.rows else ""
        print(f"{len(skills)} {name}: {result['growth'][name]}{losses}", flush=True)
        if len(skills) in MEASURED_AT:
            result["at"][len(skills)] = measure(model, skills, folder, with_losses=bool(arguments.rows))
            folder.write("measured", result)


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    print(
        "| skills | CPU seconds a growth | experts / library / gate, MB | RSS, MB | routed right, mean / worst | gain "
        "kept, mean / worst |\n|---|---|---|---|---|---|"
    )
    growth = list(result["growth"].values())
    for count, record in result["at"].items():
        seconds = [item["seconds"] for item in growth[max(int(count) - 4, 1) : int(count)]]  # the last four
        parts = " / ".join(f"{record['bytes'][name] / 1e6:,.1f}" for name in ("experts", "library", "gate"))
        right = {name: item["right"] for name, item in record["skills"].items()}
        kept = {
            name: (item["base"] - item["routed"]) / (item["base"] - item["own"])
            for name, item in record["skills"].items()
            if "base" in item
        }
        cells = [f"{count}", f"{sum(seconds) / len(seconds):.2f}", parts, f"{record['rss'] / 1e6:,.0f}"]
        for found in filter(None, (right, kept)):
            worst = min(found, key=found.__getitem__)
            cells.append(f"{sum(found.values()) / len(found):.3f} / {found[worst]:.3f} ({worst})")
        print("| " + " | ".join(cells) + " |")
    for count, record in result["at"].items():
        pairs = ", ".join(f"{pair['first']} and {pair['second']}" for pair in record["confusable"])
        print(f"\nAfter {count} skills the library cannot tell apart: {pairs or 'none'}.")
    known = [name for name, item in result["growth"].items() if not item["novel"]]
    print(f"\nNot new to the detector: {', '.join(known) or 'none'}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--skills", type=int, default=MEASURED_AT[-1], help="how many")
    parser.add_argument(
        "--rows", type=int, default=16, help="rows of 256 tokens that an expert is trained on; 0: the gate alone"
    )
    parser.add_argument("--sample", type=int, default=64, help="rows from which the library knows a skill")
    parser.add_argument("--held_out", type=int, default=8, help="held-out rows of 256 tokens, a skill")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the base")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    folder = Folder(arguments.output, settings)
    if len(folder.read("measured", {"growth": {}})["growth"]) < arguments.skills:
        run(arguments, folder)
    show(folder.read("measured", None))


if __name__ == "__main__":
    main()
