"""``python -m dev.stagediff``."""

import sys

from dev.stagediff.cli import main

if __name__ == "__main__":
    sys.exit(main())
