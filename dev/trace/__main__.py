"""``python -m dev.trace``."""

import sys

from dev.trace.cli import main

if __name__ == "__main__":
    sys.exit(main())
