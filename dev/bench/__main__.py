"""``python -m dev.bench``."""

import sys

from dev.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
