"""The file of results: JSON lines, one record each, appended as they are made.

Invariant: a line is written whole and flushed, so an interrupted run leaves at most one broken line, the last.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """All records; none if there is no file. Of two with one key the later counts.

    Raises:
        ConfigError: for a line before the last that is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ConfigError(f"line {number} of {path}", line[:80], "a JSON record", "Name another --out.") from None
        # later ones at the end, as in the file
        records.pop(record["key"], None)
        records[record["key"]] = record
    return list(records.values())


def append_record(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                _drop_broken_line(file)
        file.write(line.encode())


def _drop_broken_line(file: Any) -> None:
    """Cut off what a run that was killed while writing has left."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
