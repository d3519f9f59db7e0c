"""`dylora generate`: continue a prompt, with each token coloured by its expert."""

from __future__ import annotations

from dylo_moe.parsing.plain import PlainParser
from dylo_moe.utils.garbage import no_garbage_collection


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    parser = make_parser()
    if parser.shows_help(words or ["--help"]):
        return 0
    values = parser.read(words)
    with no_garbage_collection():
        from dylo_moe.commands.generate.run import generate

    generate(**values)
    return 0


def make_parser() -> PlainParser:
    """The parser of the command."""
    parser = PlainParser(
        "dylora generate",
        "--checkpoint FOLDER --prompt TEXT [--FLAG VALUE ...]",
        "Continue a prompt with a trained model. Each token is coloured by the expert that processed it. Where routing "
        "is decided once for each answer, a line tells who wrote it.",
        [
            "dylora generate --checkpoint runs/code/checkpoint --prompt 'Sort a list.'",
            "dylora generate --checkpoint runs/code/checkpoint --raw --prompt 'def clamp('",
        ],
        meant=dict.fromkeys(("model", "run", "output_dir", "resume_from_checkpoint"), "checkpoint")
        | {"max_tokens": "max_new_tokens", "max_length": "max_new_tokens", "text": "prompt", "adapter": "expert"},
    )
    parser.add_flag("--checkpoint", is_needed=True, help="A run's folder, or the folder that holds dylora.json.")
    parser.add_flag("--prompt", is_needed=True, help="The question to answer, or with --raw the text to continue.")
    parser.add_argument("--raw", action="store_true", help="Continue the prompt as plain text, without a template.")
    parser.add_flag("--expert", help="The expert of every token, or of the answer; base: the unchanged model.")
    parser.add_flag("--max_new_tokens", kind=int, default=128, help="Longest continuation, in tokens.")
    parser.add_flag(
        "--temperature", kind=float, default=0.0, help="0: greedy decoding; above 0: sampling at this temperature."
    )
    parser.add_flag("--seed", kind=int, default=0, help="Seed of the sampling.")
    return parser
