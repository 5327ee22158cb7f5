"""`python -m sglang_sparsespec.acceptance`."""

from __future__ import annotations

import sys

from sglang_sparsespec.acceptance.cli import main

if __name__ == "__main__":
    sys.exit(main())
