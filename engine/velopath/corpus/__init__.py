"""The demo's corpus: real text of clearly different domains, taken from files of pinned packages.

`build_corpus` extracts, cleans, cuts into documents, drops duplicates, orders by hash and writes JSON Lines.
No text is part of velopath: the manifest names package, version, licence, files and hashes, and the builder
opens those files only. The same versions give the same bytes on every machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from velopath.corpus.manifest import MANIFEST, Domain, Manifest, load_manifest
from velopath.corpus.near_duplicates import SeenPassages
from velopath.corpus.sources import downloads_folder, fetch_archives, read_archive, read_installed
from velopath.corpus.text import EXTRACTORS, LEAST_BYTES, pack
from velopath.errors import ConfigError, DataError

DOMAIN_BYTES = 1_500_000
"""No domain gets more text than this (UTF-8, both slices together)."""

Progress = Callable[[str, int, int], None]
"""Called as (what is being done, steps done, steps in all)."""


class CorpusWarning(UserWarning):
    """The corpus differs from the published one, so losses will too."""


@dataclass(frozen=True)
class Document:
    """One text with its origin; `key` is the SHA-256 of the text and orders the corpus."""

    text: str
    source: str
    key: str

    @classmethod
    def of(cls, text: str, source: str) -> Document:
        return cls(text, source, hashlib.sha256(text.encode()).hexdigest())

    def slice(self, slices: int) -> int:
        """The data slice, from 0; a second hash, so that it says nothing of other splits by `key`."""
        return int(hashlib.sha256(b"slice\0" + self.key.encode()).hexdigest(), 16) % slices


@dataclass(frozen=True)
class DomainReport:
    """What was written of one domain: UTF-8 bytes and documents, in all and per slice; what was dropped
    (exact duplicates, near duplicates, documents over the cap); licence, source, hash of all texts."""

    bytes: int
    documents: int
    slice_bytes: tuple[int, ...]
    slice_documents: tuple[int, ...]
    exact_duplicates: int
    near_duplicates: int
    over_cap: int
    licence: str
    source: str
    sha256: str


@dataclass(frozen=True)
class CorpusReport:
    """The corpus in `out`: per domain its report and its files (one per slice), and the warnings given."""

    out: Path
    slices: tuple[str, ...]
    domains: dict[str, DomainReport]
    warnings: tuple[str, ...]

    def file(self, slice_name: str, domain: str) -> Path:
        """The JSON Lines file of a domain in a slice: fields `text`, `id`, `source`."""
        return self.out / slice_name / f"{domain}.jsonl"


def build_corpus(
    out: Path,
    *,
    cache: Path | None = None,
    slices: int = 2,
    progress: Progress | None = None,
    manifest: Path = MANIFEST,
) -> CorpusReport:
    """Write `out/slice-1/<domain>.jsonl`, `out/slice-2/...` and `out/corpus.json`; return what they hold.

    Documents go to slices by hash, in about equal parts; duplicates are removed before, so that none stands
    on two sides of this or of any later split. Archives are downloaded once into `cache` (by default
    $VELOPATH_CACHE or ~/.cache/velopath). Another version of a package, a missing or different file and a
    result other than the manifest's give a `CorpusWarning`, also found in the report. Raises `ConfigError`
    where `slices` is below 1, `DataError` where an archive cannot be had or is not the pinned one, or where
    a domain ends up empty.
    """
    if slices < 1:
        raise ConfigError(f"slices is {slices}; expected 1 or more")
    plan = load_manifest(manifest)
    tell = progress or (lambda what, done, total: None)
    steps = len(plan.domains) + 1
    tell("archives", 0, steps)
    archives = fetch_archives(plan.packages, downloads_folder(cache), lambda text: tell(text, 0, steps))
    names = tuple(f"slice-{i + 1}" for i in range(slices))
    told: list[str] = []
    reports = {}
    for step, (name, domain) in enumerate(sorted(plan.domains.items()), start=1):
        tell(name, step, steps)
        found = list(_documents(plan, name, domain, archives, told))
        reports[name] = _write_domain(Path(out), names, name, found, plan)
        expected = domain.sha256
        if expected is not None and reports[name].sha256 != expected:
            told.append(
                f"domain {name}: the text's SHA-256 is {reports[name].sha256[:16]}..., the manifest has "
                f"{expected[:16]}...: losses will differ from the published ones"
            )
    for text in dict.fromkeys(told):
        warnings.warn(text, CorpusWarning, stacklevel=2)
    report = CorpusReport(Path(out), names, reports, tuple(dict.fromkeys(told)))
    _write(report.out / "corpus.json", [_summary(report, plan)])
    tell("done", steps, steps)
    return report


def _documents(
    plan: Manifest, name: str, domain: Domain, archives: dict[str, Path], told: list[str]
) -> Iterator[Document]:
    """Documents of one domain as cut from its files, duplicates still among them."""
    extract, separator = EXTRACTORS[domain.kind]
    for package, files in domain.files.items():
        if package in archives:
            contents = read_archive(archives[package], files)
        else:
            contents, warning = read_installed(package, plan.packages[package].version, files)
            if warning:
                told.append(warning)
        listed = [path for path in files if path in contents]
        for group, paths in groupby(listed, key=lambda path: _group(domain.group, path)):
            blocks: list[str] = []
            for path in paths:
                try:
                    blocks += extract(contents[path].decode("utf-8"))
                except (UnicodeDecodeError, SyntaxError) as error:
                    told.append(f"{package}: {path} left out, it cannot be read: {error}")
            for number, text in enumerate(pack(blocks, separator), start=1):
                if len(text.encode()) >= LEAST_BYTES:
                    yield Document.of(text, f"{package} {plan.packages[package].version}: {group}#{number}")


def _group(pattern: str | None, path: str) -> str:
    match = re.search(pattern, path) if pattern else None
    return match[0] if match else path


def _write_domain(
    out: Path, slices: Sequence[str], name: str, found: list[Document], plan: Manifest
) -> DomainReport:
    kept, exact, near, over = _select(found)
    if not kept:
        packages = ", ".join(f"{p} {plan.packages[p].version}" for p in plan.domains[name].files)
        raise DataError(f"domain {name!r} has no text; it is made from {packages}: install that", path=out)
    parts: list[list[Document]] = [[] for _ in slices]
    for document in kept:
        parts[document.slice(len(slices))].append(document)
    for part, slice_name in zip(parts, slices, strict=True):
        rows = ({"text": d.text, "id": f"{name}/{d.key[:16]}", "source": d.source} for d in part)
        _write(out / slice_name / f"{name}.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
    sizes = tuple(sum(len(d.text.encode()) for d in part) for part in parts)
    used = [plan.packages[p] for p in plan.domains[name].files]
    return DomainReport(
        bytes=sum(sizes),
        documents=len(kept),
        slice_bytes=sizes,
        slice_documents=tuple(len(part) for part in parts),
        exact_duplicates=exact,
        near_duplicates=near,
        over_cap=over,
        licence=" and ".join(dict.fromkeys(p.licence for p in used)),
        source="; ".join(
            f"{n} {plan.packages[n].version}: {plan.packages[n].source}" for n in plan.domains[name].files
        ),
        sha256=hashlib.sha256("".join(d.text for d in kept).encode()).hexdigest(),
    )


def _select(found: list[Document]) -> tuple[list[Document], int, int, int]:
    """Documents in order of their hash, without duplicates, up to the cap; and the counts of those dropped:
    exact duplicates, near duplicates, over the cap."""
    unique = {document.key: document for document in reversed(found)}
    kept: list[Document] = []
    seen = SeenPassages()
    size = near = 0
    ordered = [unique[key] for key in sorted(unique)]
    for number, document in enumerate(ordered):
        if size + len(document.text.encode()) > DOMAIN_BYTES:
            return kept, len(found) - len(unique), near, len(ordered) - number
        if seen.admit(document.text):
            kept.append(document)
            size += len(document.text.encode())
        else:
            near += 1
    return kept, len(found) - len(unique), near, 0


def _summary(report: CorpusReport, plan: Manifest) -> str:
    packages = {
        name: {
            "version": p.version,
            "licence": p.licence,
            "source": p.source,
            "downloaded": p.archive is not None,
        }
        for name, p in sorted(plan.packages.items())
    }
    domains = {
        name: {**vars(d), "expected": d.sha256 == plan.domains[name].sha256}
        for name, d in report.domains.items()
    }
    content = {
        "version": 1,
        "slices": report.slices,
        "domains": domains,
        "packages": packages,
        "warnings": report.warnings,
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _write(path: Path, lines: Iterable[str]) -> None:
    """Write lines; the file appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
    os.replace(partial, path)
