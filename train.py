"""`python train.py ...` is `dylora train ...`."""

import sys

from dylo_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
