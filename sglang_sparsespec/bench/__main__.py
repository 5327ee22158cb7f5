"""python -m sglang_sparsespec.bench"""

import sys

from sglang_sparsespec.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
