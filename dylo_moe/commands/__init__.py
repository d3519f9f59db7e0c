"""The commands of `dylora`, a package each; what they share is in `dylo_moe.parsing`.

A package's `main` imports its parser and its work when it runs, and not before: help and mistakes then answer at once,
without the seconds that PyTorch and Transformers take to import.
"""
