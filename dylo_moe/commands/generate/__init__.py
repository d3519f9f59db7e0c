"""`dylora generate`: continue a prompt, with each token coloured by its expert."""

from __future__ import annotations

import argparse


def main(words: list[str]) -> int:
    """Run the command on the words behind its name; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dylora generate",
        allow_abbrev=False,
        description="Continue a prompt with a trained model. Each token is coloured by the expert that processed it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", required=True, help="a checkpoint folder (the one that holds dylora.json)")
    parser.add_argument("--prompt", required=True, help="the question to answer, or with --raw the text to continue")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as plain text, without a chat template")
    parser.add_argument("--expert", help="send every token to this expert; base: to the unchanged model")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="longest continuation, in tokens")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: greedy decoding; above 0: sampling at this temperature"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    arguments = parser.parse_args(words)
    from dylo_moe.commands.generate.run import generate

    generate(**vars(arguments))
    return 0
