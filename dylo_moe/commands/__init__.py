"""The commands of `dylora`, a module or folder each."""
