"""The downstream hook: any command that judges an exported version, its scores kept in the lineage."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from velopath.errors import ConfigError, DataError, StoppedError, VelopathError
from velopath.run import Run
from velopath.runlineage import read_lineage

POLL_SECONDS = 0.2


def score_version(run: Run, name: str, model: Path) -> dict[str, float] | None:
    """Run `evaluate.command` on the exported `model` of version `name` and record its scores, once; returns them.

    None where no command is configured. In the command {model}, {name}, {run} and {out} stand for the export, the
    version, the run folder and a place to write to. Scores are the numbers of the JSON that it leaves at {out} (a file,
    or a folder whose newest .json counts, as lm-eval writes it), else of its standard output. No shell is involved.
    Raises `ConfigError`, `VelopathError` with the end of its output where it fails, and `DataError` without scores.
    """
    command = run.config.evaluate.command
    if command is None or not run.dist.is_main:
        return None
    known = read_lineage(run.folder).find(name).scores
    if known:
        return dict(known)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "scores.json"
        places = {"model": model.resolve(), "name": name, "run": run.folder.path.resolve(), "out": out}
        try:
            words = [word.format(**places) for word in shlex.split(command)]
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                f"evaluate.command {command!r}: {error}; expected words with {{model}}, {{name}}, {{run}}, {{out}}"
            ) from error
        run.note(name, f"downstream: {shlex.join(words)}")
        text = _output(run, words, Path(scratch))
        scores = dict(_numbers(_result(text, out, command)))
    if not scores:
        raise DataError(f"evaluate.command {command!r} gave no number to keep", path=model)
    run.folder.append_event({"event": "scores", "name": name, "scores": scores, "command": shlex.join(words)})
    return scores


def _output(run: Run, words: list[str], scratch: Path) -> str:
    """The command's standard output; a requested stop ends it."""
    files = [scratch / "stdout", scratch / "stderr"]
    with files[0].open("wb") as out, files[1].open("wb") as err:
        try:
            process = subprocess.Popen(words, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise ConfigError(f"evaluate.command: cannot start {words[0]!r}: {error}") from error
        while True:
            try:
                code = process.wait(POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                if run.stop.requested:
                    process.terminate()
                    process.wait()
                    raise StoppedError(
                        "stopped during the downstream evaluation; the same command runs it again"
                    ) from None
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    if code:
        raise VelopathError(
            f"evaluate.command ended with code {code}: {shlex.join(words)}\n{(texts[1] or texts[0])[-2000:].strip()}"
        )
    return texts[0]


def _result(text: str, out: Path, command: str) -> Any:
    """The JSON at `out`, else the last JSON value that standard output ends with."""
    found = max(out.rglob("*.json"), key=lambda p: p.stat().st_mtime, default=None) if out.is_dir() else out
    if found is not None and found.is_file():
        text = found.read_text(encoding="utf-8")
    lines = text.strip().splitlines()
    for first in (0, *range(len(lines) - 1, 0, -1)):
        try:
            return json.loads("\n".join(lines[first:]))
        except ValueError:
            continue
    raise DataError(f"evaluate.command {command!r} wrote no JSON: expected scores by name", path=out)


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number of nested maps by its path; of lm-eval's result file those of its `results`."""
    if isinstance(value, dict):
        inner = value["results"] if not key and isinstance(value.get("results"), dict) else value
        for name, part in inner.items():
            yield from _numbers(part, f"{key}/{name}" if key else str(name))
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        yield key or "score", float(value)
