"""The command `dylora experts`: list the experts of a checkpoint, remove one, or fit all gate rows again."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from rich.text import Text
from torch.nn.functional import cosine_similarity

from dylo_moe.continual.config import GrowthConfig
from dylo_moe.continual.confusable import confusable_skills
from dylo_moe.continual.gate_change import NUM_DRAWS, GateProbe
from dylo_moe.continual.growth import GateRows
from dylo_moe.model.checkpoint import checkpoint_in, manifest_or_problem, read_manifest
from dylo_moe.model.loading import load_library
from dylo_moe.model.model import DyLoRAMoE
from dylo_moe.model.saving import save_checkpoint
from dylo_moe.report.skill_pairs import show_confusable
from dylo_moe.routing.config import BASE, SHARED
from dylo_moe.utils.checks import SEED, range_problems
from dylo_moe.utils.screen import Screen
from dylo_moe.utils.table import Table
from dylo_moe.utils.words import listed


def list_experts(checkpoint: str) -> None:
    """Print a table of a checkpoint's experts, in gate order, with the skills that each one knows."""
    manifest = read_manifest(checkpoint)
    growth = manifest.get("growth")
    skills = {} if growth is None else skills_by_expert(growth["skills"])
    title, known = f"experts of {checkpoint}", "skills: texts, tokens seen"
    table = Table(title, ["expert", "rank", "parameters", "state", known], words=["state", known])
    if growth is not None and BASE in growth["members"]:
        table.add_row(Text(BASE, style="dim"), "-", "0", "frozen", "text of no known skill")
    for expert in manifest["experts"]:
        state = ("mature" if expert["mature"] else "nascent") + ("" if expert["trainable"] else ", frozen")
        known = "; ".join(skills.get(expert["name"], [])) or "not known"
        table.add_row(Text(expert["name"]), str(expert["rank"]), f"{expert['parameters']:,}", state, Text(known))
    if SHARED in manifest:
        shared = manifest[SHARED]
        state = "trainable" if shared["trainable"] else "frozen"
        cells = (str(shared["rank"]), f"{shared['parameters']:,}", state, "of every token, beside its experts")
        table.add_row(Text(SHARED, style="dim"), *cells)
    screen = Screen("experts", is_answer=True)
    screen.say(table)
    if growth is None:
        screen.say("It has no skill library: it was trained jointly, and its pool is fixed.")
    elif not growth["allow_expert_growth"]:
        screen.say("Its pool is fixed: new data is reported, and grows no expert.")
    if growth is not None:
        library = load_library(checkpoint_in(checkpoint), manifest)
        assert library is not None
        pairs = confusable_skills(library, GrowthConfig(**growth["config"]))
        show_confusable(screen, pairs, checkpoint, most=len(pairs))


def remove_expert(checkpoint: str, name: str, output: str) -> None:
    """Write a checkpoint without one expert, its gate row and its skills; the other experts stay bit-equal."""
    manifest = manifest_or_problem(checkpoint, output_problems(output), expert=name, or_base=False)
    if len(manifest["experts"]) == 1:
        raise ValueError(f"{name} is the only expert of {checkpoint}; a checkpoint has at least one")
    model = DyLoRAMoE.from_pretrained(checkpoint)
    gone = model.remove_expert(name)
    save_checkpoint(model, output)
    known = f", and with it what the skill library held of {', '.join(gone)}" if gone else ""
    verb = "remains" if len(model.experts) == 1 else "remain"
    screen = Screen("experts")
    screen.say(f"{name} was removed{known}; {', '.join(model.experts.names)} {verb}.")
    screen.result("checkpoint", output)


class Change(NamedTuple):
    """What a refit of the gate rows changes for one skill."""

    skill: str
    expert: str
    before: float
    """The share of draws from the skill's statistics that are routed to its own expert by the present gate rows."""
    after: float
    """The share of the same draws that are routed to its own expert by the refitted gate rows."""
    alike: float
    """The cosine between the expert's present gate row and its refitted one."""


def refit(checkpoint: str, output: str | None, *, seed: int) -> None:
    """Fit all gate rows again to the skill library, print what changes, and write the model to `output` if given."""
    problems = [*range_problems({"seed": seed}, {"seed": SEED}), *output_problems(output)]
    manifest = manifest_or_problem(checkpoint, problems)
    if manifest.get("growth") is None:
        raise ValueError(f"{checkpoint} has no skill library to fit gate rows to; it was trained jointly")
    model = DyLoRAMoE.from_pretrained(checkpoint)
    assert model.growth is not None
    if model.growth.unknown_experts:
        raise ValueError(
            f"the library of {checkpoint} knows no skill of {listed(model.growth.unknown_experts)}, so that their gate "
            "rows cannot follow from it, and would not fit beside rows that do; know_skill() tells it"
        )
    changes = refit_changes(model, model.growth.refit(), seed=seed)
    title = f"share of {NUM_DRAWS:,} draws from each skill's statistics that are routed to its expert"
    table = Table(title, ["skill", "expert", "now", "after a refit", "row's cosine"], words=["expert"])
    for change in changes:
        shares = [f"{share:.1%}" for share in (change.before, change.after)]
        table.add_row(Text(change.skill), Text(change.expert), *shares, f"{change.alike:.4f}")
    screen = Screen("experts")
    screen.answer(table)
    if output is None:
        screen.say("Nothing was written. With --output FOLDER the refitted model is written there.")
        return
    save_checkpoint(model, output)
    screen.file("refitted", output)


def refit_changes(model: DyLoRAMoE, rows: GateRows, *, seed: int) -> list[Change]:
    """Compare the model's gate rows with other ones, skill by skill, and set these."""
    router, library, growth = model.router, model.library, model.growth
    assert growth is not None
    probe = GateProbe(library, seed=seed)
    old_rows, old_choices = {name: router.gate[name].detach().clone() for name in rows}, probe.choices(router)
    growth.set_rows(rows)
    changes = probe.changes(old_choices, probe.choices(router))
    return [
        Change(
            skill,
            library[skill].expert,
            change.before,
            change.after,
            float(
                cosine_similarity(old_rows[library[skill].expert], router.gate[library[skill].expert].detach(), dim=0)
            ),
        )
        for skill, change in changes.items()
    ]


def output_problems(output: str | None) -> list[str]:
    """The problem of an output that exists; there is none where no output is given."""
    if output is None or not Path(output).exists():
        return []
    return [f"output {output} exists; name a new folder, so that no checkpoint is overwritten"]


def skills_by_expert(record: dict) -> dict[str, list[str]]:
    """Describe the skills of each expert in words, from the record of a skill library."""
    found: dict[str, list[str]] = {}
    for skill in record["skills"]:
        if skill["name"] != BASE:
            text = f"{skill['name']}: {skill['num_texts']:,}, {skill['num_tokens']:,}"
            found.setdefault(skill["expert"], []).append(text)
    return found
