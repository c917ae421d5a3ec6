"""The run folder on disk: what the loop writes and report, log and explain read.

| file | content |
| --- | --- |
| `config.yaml` | the resolved configuration; its sha256 is the config hash |
| `run.json` | what ran, when and where (keys below) |
| `data.json` | {slice: its `domains.json`}: tokens, documents, bytes, licence, source per domain |
| `plan.json` | what was planned, see `velopath.plan` |
| `targets.json` | the fitted targets, see `velopath.targets` |
| `audit/` | one log of the weights per segment and slice, see `velopath.audit` |
| `lineage.jsonl` | one lineage event a line, see `velopath.lineage`; flushed to disk one by one |
| `metrics.jsonl` | the record of the run, one JSON object a line (below) |
| `base/` | the run, of the same form, that made the base model, where this run has one of its own |
| `checkpoints/` `versions/` `exports/` | tensors |
| `report.html` `summary.json` `*.png` | what `velopath report` draws from all of the above |

Keys of `run.json`: `name`, `command`, `state` (running, done, stopped, failed), `started` and `ended`
(ISO 8601), `seconds`, `versions` {package: version}, `hardware` {what: value}, `seed`.

A metrics record names its `kind`, its `segment` ("base", "proxy", "proxy-STEP" for the short decay of a point, "main",
or a version's name) and its `step`, which counts the updates done:

| kind | further fields |
| --- | --- |
| `step` | `loss`, `rate`, `tokens` a step, `tokens_per_second`, `grad_norm`, `stream`, `data_wait_share`, `seconds` |
| `eval` | `loss` {domain: nats}, its `stderr`, `tokens` {domain: held-out tokens}, `slice` |
| `version` | as `eval`, on the larger sample that a version is judged by: at its branch point and its end |
| `control` | `weights`, `velocity` or null, `initial`, `target`, `flagged`, `clipped`, `reason`, `slice`, more below |
| `alarm` | `alarms` [{`rule`, `domain`, `value`, `limit`, `text`}], see `velopath.alarms`; `slice` |
| `exposure` | `domains` {domain: {`rows`, `tokens`, `epochs`, `unique_tokens`}} of the `slice` so far, global |
| `sampler` | `tokens_per_second` of the sampler alone |
| `resume` | nothing: the segment went on from its checkpoint at `step`; its earlier records beyond are void |

A rollback is a `resume` record too; undoing it appends the voided records again, with the number of the `change`.

`seconds` is the wall time since the record before, evaluations and saves included; `phase_seconds` of it (see
`velopath.phases`). Also in `step`: `flops_per_second` of the model and, where the device's peak is known, `mfu`.

A `control` record has the `losses` that the controller saw, their `stderr` and the `progress` it was told, enough to
make the update again; behind a filter `filtered`; in shadow mode `shadow` (true) and `proposed`, while `weights` are
those in force.

`stream` is the hash of all (step, domain, row) ids that the segment's slice has given up to `step`, the same whatever
the number of ranks, see `velopath.stream_order`; `velopath replay` computes it again from the logs in `audit/`.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from velopath.durable import make_folder, write_durably, write_error
from velopath.errors import ConfigError, DataError
from velopath.metric_record import misfit

Record = dict[str, Any]


def is_proxy(segment: str) -> bool:
    """Whether a segment's name is that of the proxy trunk or of a short decay from one of its points."""
    return segment == "proxy" or segment.removeprefix("proxy-").isdigit() and segment.startswith("proxy-")


class RunFolder:
    """One run's folder. Reading needs no lock; whoever writes holds `lock()`.

    Raises `DataError` when `path` does not exist and `create` is false.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path)
        if create:
            make_folder(self.path)
        elif not self.path.is_dir():
            raise DataError(
                "no such run folder; give the folder that `velopath train` or `velopath demo` wrote",
                path=self.path,
            )
        self._metrics: int | None = None

    def audit(self, segment: str, slice: str) -> Path:
        """Where a segment's log of the weights on one slice lies."""
        return self.path / "audit" / f"{segment}.{slice}.jsonl"

    def check_is_run(self) -> None:
        """Raise `DataError` where the folder is not one that `velopath train` or `velopath demo` wrote."""
        if not any(
            (self.path / name).exists()
            for name in ("config.yaml", "run.json", "metrics.jsonl", "lineage.jsonl")
        ):
            raise DataError("not a run folder: it has no config.yaml and no record", path=self.path)

    # -- metrics ---------------------------------------------------------------------------------------------

    def append_metric(self, record: Mapping[str, Any]) -> None:
        """Append one record to `metrics.jsonl` in one write: a crash tears at most the last line.

        A number that is not finite is written as null: JSON knows no NaN. A torn last line left by a killed
        process is cut off by the first append. Raises `WriteError`, and leaves no part of the line, where the disk
        refuses.
        """
        if self._metrics is None:
            self._metrics = _open_append(self.path / "metrics.jsonl")
        _append(self._metrics, _line(record), self.path / "metrics.jsonl")

    def metrics(self, kind: str | None = None, segment: str | None = None) -> list[Record]:
        """The records in force, in the order written: of several per (segment, kind, step, slice) the last.

        A resumed run writes the steps after its checkpoint again; a `resume` record voids what its segment
        had beyond that step. A torn last line is skipped. Raises `DataError` on any other
        line that is not a record, see `velopath.metric_record`.
        """
        kept: dict[tuple[Any, ...], Record] = {}
        for record in self.records():
            names = ("segment", "kind", "step", "slice")
            key: tuple[Any, ...] = tuple(record.get(name) for name in names)
            if key[1] == "resume":
                kept = {k: r for k, r in kept.items() if k[0] != key[0] or k[2] <= key[2]}
                continue
            kept.pop(key, None)
            kept[key] = record
        return [
            r
            for (seg, kin, _, _), r in kept.items()
            if (kind is None or kin == kind) and (segment is None or seg == segment)
        ]

    def records(self) -> Iterator[Record]:
        """Every record of `metrics.jsonl` as written, also those that a resume made void."""
        path = self.path / "metrics.jsonl"
        for line, record in _read_lines(path):
            if found := misfit(record):
                raise DataError(found[1], path=path, line=line, field=found[0])
            yield record

    # -- lineage ---------------------------------------------------------------------------------------------

    def append_event(self, event: Mapping[str, Any]) -> None:
        """Append one event to `lineage.jsonl`; it is on the disk when this returns, or nothing was written."""
        path = self.path / "lineage.jsonl"
        handle = _open_append(path)
        try:
            _append(handle, _line(event), path, sync=True)
        finally:
            os.close(handle)

    def events(self) -> list[Record]:
        """The lineage events in order. A torn last line is skipped; any other bad line is a `DataError`."""
        return [event for _, event in _read_lines(self.path / "lineage.jsonl")]

    # -- whole files -----------------------------------------------------------------------------------------

    def write_json(self, name: str, value: Any) -> Path:
        """Write `name` whole or not at all (temporary file, fsync, rename) and return its path."""
        return self.write_text(name, json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write the UTF-8 file `name` whole or not at all and return its path."""
        target = self.path / name
        make_folder(target.parent)
        write_durably(target, text.encode(errors="replace"))
        return target

    def read_json(self, name: str) -> Any:
        """The value of the JSON file `name`, or None where the run has no such file. Raises `DataError`."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON: {error}", path=path) from error

    # -- one writer ------------------------------------------------------------------------------------------

    def lock(self) -> RunLock:
        """Take the run for writing until the lock is closed (it is a context manager).

        Raises `ConfigError` naming pid and host when another process holds it. The lock of a process of this
        host that has died is taken over.
        """
        return RunLock(self.path / "lock")

    def close(self) -> None:
        """Close the metrics file."""
        if self._metrics is not None:
            os.close(self._metrics)
            self._metrics = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RunLock:
    """The exclusive lock of a run folder: a file with pid and host, under the kernel's `flock` while held.

    The kernel frees `flock` with its process, so a crash leaves only the text. That matters between hosts:
    a shared file system may not pass `flock` on, and there the holder cannot be checked and is believed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            self._take(self._handle)
        except BaseException as error:
            os.close(self._handle)
            self._handle = None
            if isinstance(error, OSError):
                raise write_error(error, path) from error
            raise

    def _take(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(_holder(handle), "wait for it or stop it") from None
        holder = _holder(handle)
        if holder and holder.get("host") != socket.gethostname():
            raise self._refusal(holder, f"if that process is gone, delete {self.path}")
        if holder and _alive(holder):
            raise self._refusal(holder, "wait for it or stop it")
        os.ftruncate(handle, 0)
        pid = os.getpid()
        text = {"pid": pid, "host": socket.gethostname(), "started": _start_ticks(pid)}
        os.pwrite(handle, _line(text), 0)
        os.fsync(handle)

    def _refusal(self, holder: Record, advice: str) -> ConfigError:
        who = f"process {holder.get('pid', 'unknown')} on host {holder.get('host', 'unknown')}"
        return ConfigError(f"run folder {self.path.parent} is being written by {who}; {advice}")

    def close(self) -> None:
        """Give the run back; a second call does nothing."""
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _holder(handle: int) -> Record:
    """Who the lock file names; empty when it names nobody (released, or torn by a crash)."""
    try:
        value = json.loads(os.pread(handle, 4096, 0))
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _alive(holder: Record) -> bool:
    """Whether the named process of this host still runs; a reused pid has another start time."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, under another user
    return holder.get("started") == _start_ticks(pid)


def _start_ticks(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None where the system has no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(_finite(record), ensure_ascii=False, separators=(",", ":")) + "\n").encode()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_error(error, path) from error


def _open_append(path: Path) -> int:
    """Open for appending, after cutting off a torn last line."""
    handle = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    size = end = os.fstat(handle).st_size
    while end and os.pread(handle, 1, end - 1) != b"\n":
        end -= 1
    if end != size:
        os.ftruncate(handle, end)
    return handle


def _append(handle: int, line: bytes, path: Path, *, sync: bool = False) -> None:
    """Write the whole line at the end of the file, or nothing of it."""
    size = os.fstat(handle).st_size
    try:
        while line:
            line = line[os.write(handle, line) :]
        if sync:
            os.fsync(handle)
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(handle, size)
        raise write_error(error, path) from error


def _read_lines(path: Path) -> Iterator[tuple[int, Record]]:
    """The objects of a JSON-lines file and their line numbers from 1.

    No file reads as no lines; a last line without its end is skipped.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            if raw.isspace():
                continue
            try:
                value = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise DataError(f"not JSON ({error}); the file is damaged", path=path, line=number) from error
            if not isinstance(value, dict):
                raise DataError(f"expected a JSON object, got {type(value).__name__}", path=path, line=number)
            yield number, value
