"""`python -m benchmarks.pocket`."""

import sys

from benchmarks.pocket.pocket import main

if __name__ == "__main__":
    sys.exit(main())
