"""``python -m dev.compare``."""

import sys

from dev.compare.cli import main

if __name__ == "__main__":  # the measuring processes import this module too
    sys.exit(main())
