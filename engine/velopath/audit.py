"""The audit log: every change of the weights as one line of JSON, chained by hashes.

A record's `hash` is the SHA-256 of the record without it, as canonical JSON, and `previous` is the hash of the
record before, so a changed, dropped or inserted line breaks the chain. Kinds:

| kind | written | details |
| --- | --- | --- |
| `start` | first by each sampler that uses the log: the stream begins anew at `step` | its order of rows, see `Order` |
| `fork` | instead, when the sampler is to go on from another log's stream: a branch | also `parent`, `parent_hash` |
| `rewind` | when a state is loaded: the stream goes on at `step` | `weights_id`: later pushes are undone |
| `push` | before a push takes effect at `step` | `weights_id` |
| `quarantine` | behind a `start` or `fork` that left out bad shards | `shards`: domain, shard, reason |

`parent_hash` is the hash of the last record of the log `parent`, beside this one, when the fork was made. The format
is our choice.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from velopath.domains import check_weights
from velopath.durable import make_folder, sync_folder, write_error
from velopath.errors import ConfigError, DataError
from velopath.stream_order import Order

KINDS = ("start", "push", "rewind", "fork", "quarantine")
FIRST_HASH = "0" * 64
"""`previous` of the first record."""
_FIELDS = {"id", "kind", "step", "old", "new", "reason", "digest", "details", "previous", "hash"}


@dataclass(frozen=True)
class AuditSummary:
    """What `verify` found: numbers of records and pushes, step and hash of the last record."""

    records: int
    pushes: int
    last_step: int
    last_hash: str


@dataclass(frozen=True)
class Push:
    """Weights that take effect at a step."""

    id: int
    step: int
    weights: Mapping[str, float]


@dataclass(frozen=True)
class WeightsLog:
    """What a log says about the stream in force: its order of rows, first weights, and pushes that no rewind undid.

    `begin` is the step from which on the stream is this log's own: a fork's, or the first one.
    """

    order: Order
    first: Mapping[str, float]
    pushes: tuple[Push, ...]
    begin: int


def verify(path: str | Path) -> AuditSummary:
    """Check the whole chain of the log at `path`.

    Raises `DataError` naming the line when it is not a record, its hash does not fit its content, it does not
    follow the record before, or the last line is unfinished.
    """
    records = read_log(path)
    last: dict[str, Any] = records[-1] if records else {"step": 0, "hash": FIRST_HASH}
    return AuditSummary(len(records), sum(r["kind"] == "push" for r in records), last["step"], last["hash"])


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """All records of the log at `path`, checked as `verify` does."""
    path = Path(path)
    content = _read(path)
    if content and not content.endswith(b"\n"):
        raise DataError(
            "the last record is unfinished; the writer was killed, opening the log again drops it",
            path=path,
            line=content.count(b"\n") + 1,
        )
    return _check(path, content)


def weights_log(path: str | Path) -> WeightsLog:
    """The stream that is in force at the end of the log at `path`, through its rewinds and the logs it forks from.

    Raises `DataError` naming the line of a broken chain, of a fork whose parent does not have the named record, and of
    a rewind or push that does not follow what is known.
    """
    path = Path(path)
    return _in_force(path, read_log(path))


def _in_force(path: Path, records: list[dict[str, Any]], seen: tuple[Path, ...] = ()) -> WeightsLog:
    """Follow `records` of the log at `path`; `seen` are the logs that fork from it."""
    order: Order | None = None
    first: Mapping[str, float] = {}
    known: list[Push] = []  # of the last time line, also those that a new start or a rewind may still undo
    live = 0  # so many of them are in force
    begin: int | None = None
    for line, record in enumerate(records, 1):
        details, kind = record["details"], record["kind"]
        if kind in ("start", "fork"):
            if kind == "fork":
                known, begin = list(_parent(path, line, details, seen).pushes), None
            try:
                opened = Order.from_json(details)
            except DataError as error:
                raise DataError(error.problem, path=path, line=line, field="details") from error
            if order is not None and opened != order:
                raise DataError("the stream is another one than above", path=path, line=line, field="details")
            order, first, live = opened, _weights(path, line, record, opened), 0
            begin = opened.start_step if kind == "start" and begin is None else begin
            continue
        if order is None:
            raise DataError("no start or fork; expected it in the first line", path=path, line=1)
        if kind == "quarantine":  # the order of the opening before it counts the tokens without those shards
            continue
        id = details["weights_id"]
        before = known[live - 1] if live else None
        if kind == "rewind":
            live = sum(push.id <= id for push in known)
            if (known[live - 1].id if live else 0) != id:
                raise DataError(
                    f"a rewind to weights {id}, which the log does not have", path=path, line=line
                )
            begin = record["step"] if begin is None else begin
            continue
        if id != (before.id if before else 0) + 1 or (before is not None and record["step"] <= before.step):
            raise DataError(
                f"weights {id} for step {record['step']} do not follow {before.id if before else 'the start'}",
                path=path,
                line=line,
            )
        known = [*known[:live], Push(id, record["step"], _weights(path, line, record, order))]
        live += 1
    if order is None:
        raise DataError("no start or fork; expected it in the first line", path=path, line=1)
    return WeightsLog(order, first, tuple(known[:live]), order.start_step if begin is None else begin)


def _weights(path: Path, line: int, record: Mapping[str, Any], order: Order) -> Mapping[str, float]:
    """The weights that a record brings, one for each domain of the order."""
    weights = record["new"]
    if not isinstance(weights, dict) or any(type(w) not in (int, float) for w in weights.values()):
        raise DataError("expected weights by domain", path=path, line=line, field="new")
    try:
        check_weights(weights, order.names)
    except ConfigError as error:
        raise DataError(str(error), path=path, line=line, field="new") from error
    return {name: float(weight) for name, weight in weights.items()}


def _parent(path: Path, line: int, details: Mapping[str, Any], seen: tuple[Path, ...]) -> WeightsLog:
    """The stream that a fork goes on from: its parent's up to the record that the fork names."""
    name = details.get("parent")
    if not isinstance(name, str) or Path(name).name != name or path.parent / name in (*seen, path):
        raise DataError(f"parent is {name!r}; expected a log beside this one", path=path, line=line)
    records = read_log(path.parent / name)
    for at, record in enumerate(records, 1):
        if record["hash"] == details.get("parent_hash"):
            return _in_force(path.parent / name, records[:at], (*seen, path))
    raise DataError(
        f"the log {name} has no record of the named hash", path=path, line=line, field="parent_hash"
    )


class AuditLog:
    """Appends records to the log at `path`, one durable line each; the chain found there is checked first.

    An unfinished last line, left by a killed writer, never took effect and is dropped. `parent` is the log, in the
    same folder, of the stream that this one branches from. Raises `DataError` when a chain is broken, `WriteError`
    where the log cannot be written, `ConfigError` when another sampler has it open.
    """

    def __init__(self, path: str | Path, parent: str | Path | None = None) -> None:
        self.path = Path(path)
        self._fork: dict[str, str] | None = None
        if parent is not None:
            self._fork = {"parent": Path(parent).name, "parent_hash": verify(parent).last_hash}
        make_folder(self.path.parent)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            sync_folder(self.path.parent)
        except OSError as error:
            raise write_error(error, self.path) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(
                f"{self.path} is being written by another sampler; close that one, or give this one a log of its own"
            ) from None
        content = _read(self.path)
        whole = content[: content.rfind(b"\n") + 1]
        try:
            found = _check(self.path, whole)
        except DataError:
            self.close()
            raise
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
        self.records, self.last_hash = len(found), found[-1]["hash"] if found else FIRST_HASH

    def begin(
        self, order: Order, weights: Mapping[str, float], quarantined: Sequence[Mapping[str, str]] = ()
    ) -> None:
        """Record that a sampler uses the log: a `start`, or a `fork` from the parent, and what it left out."""
        kind = "start" if self._fork is None else "fork"
        self.append(kind, step=order.start_step, new=weights, details=order.to_json() | (self._fork or {}))
        if quarantined:
            self.append("quarantine", step=order.start_step, details={"shards": list(quarantined)})

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
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, size)
            raise write_error(error, self.path) from error
        self.records += 1
        self.last_hash = str(record["hash"])
        return self.last_hash

    def rewind(self, *, step: int, weights_id: int, weights: Mapping[str, float]) -> None:
        """Record that a state was loaded: the stream continues at `step` and knows pushes up to `weights_id`."""
        self.append("rewind", step=step, new=weights, details={"weights_id": weights_id})

    def close(self) -> None:
        """Close the file; the log can be opened again."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the audit log: {error.strerror}", path=path) from error


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(record)).hexdigest()


def _check(path: Path, content: bytes) -> list[dict[str, Any]]:
    previous = FIRST_HASH
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1]):
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
        previous = record["hash"]
        records.append(record)
    return records


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
