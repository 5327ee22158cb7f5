"""What a study has measured, on file as soon as it is; and the time that it has left."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from sglang_sparsespec.bench.cells import digest
from sglang_sparsespec.bench.records import append_record, read_records

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sglang_sparsespec.bench.records import Record

# what is not measured again; a failure is
DONE = ("result", "skip")


class Book:
    """JSON lines, one for each thing that was measured, skipped or failed.

    Args:
        path: of the file; None: nothing is kept beyond this call.
        context: what decides numbers besides the thing itself: machine, versions, commit, model, options.
        facts: written on each line as well.
    """

    def __init__(self, path: Path | None, context: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        self._path, self._facts = path, facts
        self._context = digest(context)
        on_file = [] if path is None else read_records(path)
        self._records = {r["key"]: r for r in on_file if r.get("study") == self._context}

    def has(self, thing: Mapping[str, Any]) -> bool:
        """Whether there is nothing left to do about it."""
        found = self._records.get(self._key(thing))
        return found is not None and found["record"] in DONE

    def note(self, kind: str, thing: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Keep a "result", a "skip" or a "failure"."""
        line = {"record": kind, "key": self._key(thing), "study": self._context, **thing, **found, **self._facts}
        self._records[line["key"]] = line
        if self._path is not None:
            append_record(self._path, line)

    def note_failure(self, thing: Mapping[str, Any], error: BaseException) -> None:
        """Keep and say why something could not be measured; it is tried again by the next call."""
        reason = str(error)[:2000]
        self.note("failure", thing, {"reason": reason})
        print(f"failed: {dict(thing)}: {reason}", file=sys.stderr, flush=True)

    def of(self, kind: str, what: str) -> list[Record]:
        """Records of this context whose thing has this `what`."""
        return [r for r in self._records.values() if r["record"] == kind and r["what"] == what]

    def _key(self, thing: Mapping[str, Any]) -> str:
        return digest(self._context, thing)


class Allowance:
    """Time of a call.

    Args:
        minutes: from `began` on; None: no end.
        began: on the clock of time.monotonic.
    """

    def __init__(self, minutes: float | None, began: float) -> None:
        self._deadline = None if minutes is None else began + 60 * minutes

    def allows(self, seconds: float) -> bool:
        """Whether something that takes so long would end in time."""
        return self._deadline is None or time.monotonic() + seconds <= self._deadline
