"""`python -m benchmarks.quality`."""

import sys

from benchmarks.quality.quality import main

if __name__ == "__main__":
    sys.exit(main())
