"""The audit log: every change of the weights as one line of JSON, chained by hashes.

A record's `hash` is the SHA-256 of the record without it, as canonical JSON, and `previous` is the hash of the
record before, so a changed, dropped or inserted line breaks the chain. Kinds:

| kind | written | details |
| --- | --- | --- |
| `start` | when a sampler opens the log | seed, shape of the batch, tokens per domain |
| `push` | before a push takes effect at `step` | `weights_id` |
| `rewind` | when a state is loaded that does not know recorded pushes | `weights_id`: later ones are undone |
| `fork` | when a branch begins | `parent`: the hash it branches from |

The format is our choice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velopath.durable import sync_folder
from velopath.errors import DataError

KINDS = ("start", "push", "rewind", "fork")
FIRST_HASH = "0" * 64
"""`previous` of the first record."""
_FIELDS = {"id", "kind", "step", "old", "new", "reason", "digest", "details", "previous", "hash"}


@dataclass(frozen=True)
class AuditSummary:
    """What `verify` found: numbers of records and pushes, step and hash of the last record.

    `live` are the ids of the pushed weights that no rewind has undone, in order.
    """

    records: int
    pushes: int
    last_step: int
    last_hash: str
    live: tuple[int, ...]


def verify(path: str | Path) -> AuditSummary:
    """Check the whole chain of the log at `path`.

    Raises `DataError` naming the line when it is not a record, its hash does not fit its content, it does not
    follow the record before, or the last line is unfinished.
    """
    path = Path(path)
    content = _read(path)
    if content and not content.endswith(b"\n"):
        raise DataError(
            "the last record is unfinished; the writer was killed, opening the log again drops it",
            path=path,
            line=content.count(b"\n") + 1,
        )
    return _check(path, content)


class AuditLog:
    """Appends records to the log at `path`, one durable line each; the chain found there is checked first.

    An unfinished last line, left by a killed writer, never took effect and is dropped. Raises `DataError` when
    the chain is broken or the log cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            sync_folder(self.path.parent)
        except OSError as error:
            raise DataError(f"cannot open the audit log: {error.strerror}", path=self.path) from error
        content = _read(self.path)
        whole = content[: content.rfind(b"\n") + 1]
        try:
            found = _check(self.path, whole)
        except DataError:
            self.close()
            raise
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
        self.records, self.last_hash, self._live = found.records, found.last_hash, list(found.live)

    def append(
        self,
        kind: str,
        *,
        step: int,
        old: Mapping[str, float] | None = None,
        new: Mapping[str, float] | None = None,
        reason: str = "",
        digest: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> str:
        """Append one record and return its hash; it is on disk when this returns, or nothing was written."""
        record: dict[str, Any] = {
            "id": self.records,
            "kind": kind,
            "step": step,
            "old": dict(old) if old is not None else None,
            "new": dict(new) if new is not None else None,
            "reason": reason,
            "digest": digest,
            "details": dict(details or {}),
            "previous": self.last_hash,
        }
        record["hash"] = _hash(record)
        line = _canonical(record) + b"\n"
        size = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError(0, "the disk is full")
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, size)
            raise DataError(f"cannot write the audit log: {error.strerror}", path=self.path) from error
        self.records += 1
        self.last_hash = record["hash"]
        _follow(self._live, record)
        return self.last_hash

    def rewind(self, *, step: int, weights_id: int, weights: Mapping[str, float]) -> None:
        """Record that the stream continues at `step` and knows pushes up to `weights_id`, unless the log knows
        no later ones."""
        if self._live and self._live[-1] > weights_id:
            self.append("rewind", step=step, new=weights, details={"weights_id": weights_id})

    def close(self) -> None:
        """Close the file; the log can be opened again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the audit log: {error.strerror}", path=path) from error


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(record)).hexdigest()


def _follow(live: list[int], record: Mapping[str, Any]) -> None:
    """Update the ids of the pushes in force or to come by one record."""
    if record["kind"] == "push":
        live.append(record["details"]["weights_id"])
    elif record["kind"] == "rewind":
        kept = [i for i in live if i <= record["details"]["weights_id"]]
        live[:] = kept


def _check(path: Path, content: bytes) -> AuditSummary:
    previous, step, pushes = FIRST_HASH, 0, 0
    live: list[int] = []
    lines = content.split(b"\n")[:-1]
    for number, line in enumerate(lines):
        record = _record(path, number, line)
        if record["previous"] != previous:
            raise DataError(
                f"the record names {str(record['previous'])[:12]} as the one before, that has {previous[:12]}; "
                "a record was dropped, inserted or changed",
                path=path,
                line=number + 1,
                field="previous",
            )
        if record["id"] != number:
            raise DataError(
                f"id is {record['id']!r}; expected {number}", path=path, line=number + 1, field="id"
            )
        previous, step = record["hash"], record["step"]
        pushes += record["kind"] == "push"
        _follow(live, record)
    return AuditSummary(len(lines), pushes, step, previous, tuple(live))


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """One line as a record whose hash fits its content."""
    try:
        record: dict[str, Any] = json.loads(line)
        digest = _hash({k: v for k, v in record.items() if k != "hash"})
        canonical = _canonical(record)
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"not a record: {error}", path=path, line=number + 1) from error
    sound = set(record) == _FIELDS and record["kind"] in KINDS and type(record["step"]) is int
    if not sound or not isinstance(record["details"], dict):
        raise DataError(
            f"not a record of fields {sorted(_FIELDS)} and kind in {KINDS}", path=path, line=number + 1
        )
    if record["hash"] != digest or canonical != line:
        raise DataError(
            "the hash does not fit the record; it was changed", path=path, line=number + 1, field="hash"
        )
    if record["kind"] in ("push", "rewind") and type(record["details"].get("weights_id")) is not int:
        raise DataError("no weights_id", path=path, line=number + 1, field="details")
    return record
