"""Changes of a run folder that touch several files, whole or not at all: a journal of one entry.

What is to be done stands in `pending.json`, written durably, before anything is done; every part can be repeated.
A process killed in between leaves the entry, and the next writer of the run completes it. The caller holds the lock.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from velopath.durable import sync_folder
from velopath.runfolder import RunFolder

PENDING = "pending.json"


@contextmanager
def writing(path: str | Path) -> Iterator[RunFolder]:
    """The run folder at `path` under its lock, with a change that a killed process began completed."""
    with RunFolder(path) as folder:
        folder.check_is_run()
        with folder.lock():
            complete(folder)
            yield folder


def change(
    folder: RunFolder,
    event: Mapping[str, Any],
    *,
    config: str | None = None,
    moves: Sequence[tuple[str, str]] = (),
    removes: Sequence[str] = (),
    records: str | None = None,
    mark: Mapping[str, Any] | None = None,
) -> None:
    """Do all of this, over a kill at any point, with paths relative to the run's folder.

    Rename `moves` (from, to) and delete `removes`; write `config` as its config.yaml; append `event` to the lineage;
    append to the metrics the record `mark` and the lines of the file `records`.
    """
    entry = {
        "event": dict(event),
        "events_before": len(folder.events()),
        "config": config,
        "moves": [list(pair) for pair in moves],
        "removes": list(removes),
        "records": records,
        "mark": mark,
    }
    folder.write_json(PENDING, entry)
    complete(folder)


def pending(folder: RunFolder) -> dict[str, Any] | None:
    """The change that was begun and not completed, if any."""
    entry: dict[str, Any] | None = folder.read_json(PENDING)
    return entry


def complete(folder: RunFolder) -> None:
    """Complete the change that was begun, if any."""
    entry = pending(folder)
    if entry is None:
        return
    for source, target in entry["moves"]:
        _move(folder.path / source, folder.path / target)
    for name in entry["removes"]:
        _remove(folder.path / name)
    if entry["config"] is not None:
        folder.write_text("config.yaml", entry["config"])
    if len(folder.events()) == entry["events_before"]:
        folder.append_event(entry["event"])
    _append_records(folder, entry)
    (folder.path / PENDING).unlink()
    sync_folder(folder.path)


def _append_records(folder: RunFolder, entry: Mapping[str, Any]) -> None:
    """The records of a change carry its number, so that those already there are not written again."""
    number = entry["events_before"]
    wanted = [entry["mark"]] if entry["mark"] is not None else []
    if entry["records"] is not None:
        text = (folder.path / entry["records"]).read_text(encoding="utf-8")
        wanted += [json.loads(line) for line in text.splitlines()]
    there = sum(record.get("change") == number for record in folder.records()) if wanted else 0
    for record in wanted[there:]:
        folder.append_metric({**record, "change": number})


def _move(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(source, target)
        sync_folder(target.parent)
        sync_folder(source.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
