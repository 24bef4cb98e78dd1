"""Keeps the table of docs/configuration.md equal to the fields of `EplbConfig`.

python ci/configuration_table.py            # rewrites the table
python ci/configuration_table.py --check    # exit code 1 when it is out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from eplb_platform.config import EplbConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


def table() -> str:
    """One row for each key: name, default as JSON, meaning."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in EplbConfig.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | `{json.dumps(field.default)}` | {meaning} |")
    return "\n".join(rows) + "\n"


def with_table(page: str) -> str:
    """The page with its table replaced; ValueError when it has no place for one."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name}: expected the lines {BEGIN.strip()!r} and {END.strip()!r}")
    return before + begin + table() + end + after


def main(arguments: list[str]) -> int:
    page = PAGE.read_text(encoding="utf-8")
    renewed = with_table(page)
    if "--check" not in arguments:
        PAGE.write_text(renewed, encoding="utf-8")
        return 0
    if page != renewed:
        print(f"{PAGE.name} is out of date: run python ci/configuration_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
