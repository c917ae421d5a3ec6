"""Both directions against mosaicml-streaming itself; `make interop` runs it.

    PYTHONPATH=tests python -m interop.check --venv .venv-mosaic --results tests/interop/results [--keep-data]

Makes the environment where it is missing, lets the package write its grid and reads it with `read_documents` and
`open_sampler`; then writes a grid of our own, which the package reads with its hashes checked. The result is a dated
Markdown file. `--keep-data` makes tests/data/mosaic_streaming.zip, which CI reads, anew.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import subprocess
import tempfile
import time
import venv
from pathlib import Path

import numpy as np

from interop.folders import pack
from interop.reading import documents_differ
from velopath import __version__
from velopath.errors import DataError
from velopath.mds import MdsWriter, read_documents
from velopath.mds.format import TOKEN_DTYPES

REQUIREMENTS = ("mosaicml-streaming==0.13.0", "torch==2.13.0")
REFERENCE = Path(__file__).with_name("reference.py")
COMPRESSIONS = (None, "zstd", "zstd:1", "zstd:19")
HASHES: tuple[tuple[str, ...], ...] = (
    ("xxh64",),
    (),
    ("sha1", "xxh64"),
    ("blake2b", "md5", "sha256", "xxh3_128"),
)
Findings = dict[str, str]
"""Case -> what is wrong with it, "" where nothing is."""


def environment(folder: Path) -> Path:
    """Python of the environment in `folder`, made and filled where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"making {folder} with {', '.join(REQUIREMENTS)}: about 80 packages, some minutes", flush=True)
        venv.create(folder, with_pip=True)
    if subprocess.run(
        [python, "-m", "pip", "show", "-q", "mosaicml-streaming"], capture_output=True
    ).returncode:
        subprocess.run(
            [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *REQUIREMENTS], check=True
        )
    return python


def reference(python: Path, verb: str, folder: Path) -> str:
    """Standard output of the package's side, `tests/interop/reference.py`."""
    command = [python, REFERENCE, verb, folder]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=quiet).stdout


def we_read_theirs(root: Path) -> Findings:
    """Every case of the package's grid, read by us; the refused ones must raise."""
    expected = json.loads((root / "expected.json").read_text())
    findings = {}
    for name, case in expected["cases"].items():
        options = {"bytes_dtype": case["bytes_dtype"]} if "bytes_dtype" in case else {}
        findings[name] = documents_differ(root / name, expected["documents"][case["documents"]], **options)
    for name in expected["refused"]:
        try:
            list(read_documents(root / name))
            findings[name] = "is read, expected to be refused"
        except DataError:
            findings[name] = ""
    return findings


def they_read_ours(python: Path, root: Path) -> Findings:
    """A grid of our writer's settings, read by the package with every hash of the index checked."""
    written: dict[str, list[list[int]]] = {}
    grid = itertools.product(TOKEN_DTYPES, COMPRESSIONS)
    for k, (dtype, compression) in enumerate(grid):
        limit = min(int(np.iinfo(dtype).max), (1 << 31) - 1) + 1
        lengths = (1, 2, 255, 256, 60, 300)
        documents = [[(k * 7 + n + i * i * 7_919) % limit for i in range(n)] for n in lengths]
        if dtype == "uint16" and compression:
            documents += [[3] * 65_535, [4] * 65_536]
        hashes, column = HASHES[k % 4], ("tokens", "input_ids")[k // 4 % 2]
        name = f"{dtype}.{compression or 'raw'}.{'+'.join(hashes) or 'no-hash'}.{column}".replace(":", "-")
        size_limit = (1 << 26, 1_000)[k % 2]
        with MdsWriter(
            root / name,
            dtype=dtype,
            column=column,
            compression=compression,
            hashes=hashes,
            size_limit=size_limit,
        ) as writer:
            for tokens in documents:
                writer.write(tokens)
        written[name] = documents
    found = json.loads(reference(python, "read", root))
    return {
        name: "" if found[name] == documents else str(found[name])[:200]
        for name, documents in written.items()
    }


def report(theirs: Findings, ours: Findings, writer: str, seconds: float) -> str:
    """The result as Markdown."""
    lines = [
        f"# Interoperability with {writer}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, velopath {__version__}, Python "
        f"{platform.python_version()}, {platform.system()} {platform.machine()}; `make interop`, {seconds:.0f} s.",
        "",
    ]
    for title, findings in (
        ("The package writes; `read_documents` and the sampler read", theirs),
        ("`MdsWriter` writes; the package's StreamingDataset reads, hashes recomputed", ours),
    ):
        good = sum(not problem for problem in findings.values())
        lines += [
            f"## {title}: {good} of {len(findings)} cases as expected",
            "",
            "| case | |",
            "| --- | --- |",
        ]
        lines += [f"| {name} | {problem or 'as expected'} |" for name, problem in findings.items()] + [""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check both directions against mosaicml-streaming itself.")
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--keep-data", action="store_true")
    arguments = parser.parse_args()
    python, start = environment(arguments.venv), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["VELOPATH_CACHE"] = f"{scratch}/cache"
        theirs_root, ours_root = Path(scratch, "theirs"), Path(scratch, "ours")
        reference(python, "write", theirs_root)
        if arguments.keep_data:
            pack(theirs_root)
        writer = json.loads((theirs_root / "expected.json").read_text())["writer"]
        theirs, ours = we_read_theirs(theirs_root), they_read_ours(python, ours_root)
    text = report(theirs, ours, writer, time.monotonic() - start)
    arguments.results.mkdir(parents=True, exist_ok=True)
    result = arguments.results / f"{datetime.date.today()}-mosaicml-streaming.md"
    result.write_text(text)
    wrong = {name: problem for name, problem in (theirs | ours).items() if problem}
    print("\n".join(line for line in text.splitlines() if line.startswith("##")), f"\n{result}", wrong or "")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
