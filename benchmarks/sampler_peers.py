"""The sampler's peers, each in a process of its own that sleeps while others are measured."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.sampler_data import ROW_TOKENS, ROWS, SHARES, Measure

WORKERS = 2


class Peer(NamedTuple):
    """A library in one way of use; of its settings, name -> what is special, the fastest counts."""

    label: str
    environment: str
    settings: dict[str, str]


PEERS = {
    "mosaic-documents": Peer(
        "mosaicml-streaming, packing documents", "mosaic", {"": "", "workers": f"{WORKERS} workers"}
    ),
    "mosaic-rows": Peer(
        "mosaicml-streaming, rows packed offline", "mosaic", {"": "", "workers": f"{WORKERS} workers"}
    ),
    "megatron": Peer(
        "Megatron-core GPTDataset",
        "peers",
        {"": "", "workers": f"{WORKERS} workers", "resets": "positions reset per document"},
    ),
    "litdata": Peer("litdata", "peers", {"": "", "workers": f"{WORKERS} workers"}),
    "grain": Peer(
        "grain",
        "peers",
        {
            "memmap": "rows from a memmap",
            "memmap-threads": f"rows from a memmap, {WORKERS} threads",
            "records": "ArrayRecord",
            "records-threads": "ArrayRecord, 16 threads",
        },
    ),
    "datasets-map": Peer(
        "HF datasets, map-style",
        "peers",
        {"": "DataLoader", "slices": "sliced", "workers": f"DataLoader, {WORKERS} workers"},
    ),
    "datasets-iterable": Peer("HF datasets, iterable", "peers", {"": "", "workers": f"{WORKERS} workers"}),
}
_INTERPRETERS = {
    "mosaic": ("VELOPATH_MOSAIC_PYTHON", ".venv-mosaic/bin/python"),
    "peers": ("VELOPATH_PEERS_PYTHON", ".venv-peers/bin/python"),
}


def contender(peer: str, setting: str) -> str:
    """Name of a peer's setting among the contenders."""
    return f"{peer}-{setting}" if setting else peer


def labels() -> dict[str, str]:
    """What every contender of the peers is."""
    return {
        contender(name, setting): ", ".join(part for part in (peer.label, words) if part)
        for name, peer in PEERS.items()
        for setting, words in peer.settings.items()
    }


def start(root: Path, stack: ExitStack) -> tuple[dict[str, Measure], dict[str, str]]:
    """A measure for every setting that works here, warmed up, and why the others are not measured."""
    found: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    processes: dict[str, Callable[[str], dict[str, Any]]] = {}
    for name, peer in PEERS.items():
        library = name.partition("-")[0]
        variable, place = _INTERPRETERS[peer.environment]
        python = os.environ.get(variable) or place
        if not Path(python).exists():
            missing[name] = f"no {place}; `make peers` makes it, or ${variable} names another"
            continue
        try:
            if library not in processes:
                processes[library] = stack.enter_context(_Process(python, library, root))
        except RuntimeError as error:
            missing[name] = str(error)
            continue
        for setting in peer.settings:
            key = contender(name, setting)
            asked = contender(name.partition("-")[2], setting).strip("-") or "plain"
            answer = processes[library](f"{asked} 0.2")
            if "error" in answer:
                missing[key] = answer["error"]
            else:
                found[key] = _asking(processes[library], asked)
    return found, missing


def _asking(ask: Callable[[str], dict[str, Any]], name: str) -> Measure:
    def measure(seconds: float) -> dict[str, float]:
        answer = ask(f"{name} {seconds}")
        if "error" in answer:
            raise RuntimeError(f"{name}: {answer['error']}")
        return answer

    return measure


class _Process:
    """A peer's process, asked by lines; its messages go to a file beside the data."""

    def __init__(self, python: str, library: str, root: Path) -> None:
        script = Path(__file__).with_name("mosaic_peer.py" if library == "mosaic" else "data_peers.py")
        arguments = [str(root), str(ROWS), str(ROW_TOKENS), str(WORKERS), json.dumps(SHARES)]
        self.messages = root / f"{library}.log"
        self.command = [python, str(script), *arguments] + ([] if library == "mosaic" else [library])

    def __enter__(self) -> Callable[[str], dict[str, Any]]:
        with self.messages.open("w") as messages:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True
            )
        try:
            self.ask("")
        except RuntimeError:
            self.__exit__()
            raise
        return self.ask

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if line:
            print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            last = "".join(self.messages.read_text().splitlines()[-1:])
            raise RuntimeError(f"its process ended with {self.process.wait()}: {last}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
