"""`python -m sglang_sparsespec.quality`."""

from __future__ import annotations

import sys

from sglang_sparsespec.quality.cli import main

if __name__ == "__main__":
    sys.exit(main())
