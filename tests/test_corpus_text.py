"""Cleaning of the corpus: blocks of each kind of file, packing into documents, passages seen before."""

import hashlib

import pytest

from velopath.corpus import text as corpus_text
from velopath.corpus.near_duplicates import SeenPassages, shingles


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
