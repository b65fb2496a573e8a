"""``python -m weightwire.cli`` is ``weightwire``."""

from __future__ import annotations

import sys

from weightwire.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
