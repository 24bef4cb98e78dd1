"""The `eplb` command where its script is not installed: `python -m eplb_platform.cli`."""

from __future__ import annotations

from eplb_platform.cli import main

if __name__ == "__main__":
    main()
