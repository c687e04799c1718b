"""`python -m rlhf_cli` is `rlhf`, so that launchers can start it."""

import sys

from rlhf_cli.cli import main

if __name__ == "__main__":
    sys.exit(main())
