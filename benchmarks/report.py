"""Dated results: one JSON with every number and one Markdown for people, with machine, versions, commit, command."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import Bar
from velopath.durable import write_durably
from velopath.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
"""Where full runs are kept."""
LOOKS = Path("runs/benchmarks")
"""Where quick runs and smoke tests leave theirs; git ignores it."""


def command_line(arguments: Sequence[str]) -> str:
    """What was typed, as one line for a shell."""
    return shlex.join(["python", "-m", "benchmarks", *arguments])


def document(
    suite: str,
    result: Mapping[str, Any],
    bars: Sequence[Bar],
    *,
    command: str,
    seconds: float,
    quick: bool,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Everything a dated result holds, JSON-able; `load` is the machine's load average when it was written."""
    return {
        "suite": suite,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "quick": quick,
        "seconds": round(seconds, 1),
        **describe_environment(device or torch.device("cpu")),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        **_commit(),
        "bars": [bar.to_json() for bar in bars],
        "result": dict(result),
    }


def paths(folder: Path, found: Mapping[str, Any]) -> tuple[Path, Path]:
    """Where a document's JSON and Markdown belong; a quick run never takes a full one's place."""
    name = f"{found['date']}-{found['suite']}{'-quick' if found['quick'] else ''}"
    return folder / f"{name}.json", folder / f"{name}.md"


def write(folder: Path, found: Mapping[str, Any], tables: str) -> tuple[Path, Path]:
    """Write `DATE-SUITE.json` and `.md` to `folder`, whole or not at all; a later run of the day replaces both."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, markdown_path = paths(folder, found)
    write_durably(json_path, (json.dumps(_finite(found), indent=1, allow_nan=False) + "\n").encode())
    write_durably(markdown_path, markdown(found, tables).encode())
    return json_path, markdown_path


def markdown(found: Mapping[str, Any], tables: str) -> str:
    """The document for people: what was run where, the bars, the tables."""
    hardware, versions = found["hardware"], found["versions"]
    machine = ", ".join(f"{key} {value}" for key, value in hardware.items())
    commit = (found["commit"] or "unknown") + (", with uncommitted changes" if found["dirty"] else "")
    note = " Quick: shorter and smaller, for a look only." if found["quick"] else ""
    if found["suite"].endswith("-smoke"):
        note = " Smoke: tiny shapes on the CPU, to see that the code runs; its numbers and bars mean nothing."
    lines = [
        f"# {found['suite']}, {found['date']}",
        "",
        f"`{found['command']}`, {found['seconds']:.0f} s.{note}",
        "",
        f"- machine: {machine}; load average {found['load']}",
        f"- versions: {', '.join(f'{key} {value}' for key, value in versions.items())}",
        f"- commit: {commit}",
        "",
    ]
    if found["bars"]:
        lines += ["| bar | wanted | measured | |", "|---|--:|--:|---|"]
        lines += [_row(bar) for bar in found["bars"]]
        lines.append("")
    return "\n".join(lines) + "\n" + tables.rstrip() + "\n"


def _row(bar: Mapping[str, Any]) -> str:
    met = {True: "met", False: "**missed**", None: "not measured"}[bar["met"]]
    value = "" if bar["value"] is None else f"{bar['value']:.4g}"
    return f"| {bar['name']} | {bar['sense']} {bar['limit']:g} | {value} | {met} |"


def _commit() -> dict[str, Any]:
    """{"commit": hash or None, "dirty": whether tracked files differ from it or None}, of this source tree."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _finite(value: Any) -> Any:
    """`value` with None for what JSON cannot say: NaN and infinity, "not measured" to every reader."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
