"""`python submit_full_training.py ...` is `dylora submit ...`."""

import sys

from dylo_moe.cli import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
