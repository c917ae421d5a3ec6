"""From source files to clean documents: one extractor per kind of file, one packer.

An extractor turns the text of a file into blocks, the smallest pieces worth keeping whole: a function, a
docstring, a stanza, a translated string, a table row. `pack` joins neighbouring blocks into documents.
All functions here are pure.
"""

from __future__ import annotations

import ast
import csv
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator

DOCUMENT_BYTES = 4_000
"""A document grows block by block up to this size; one bigger block is a document of its own."""
LEAST_BYTES = 1_500
"""A remainder below this joins the document before it."""
MOST_BYTES = 20_000
"""A block above this is cut at line ends."""

_CPP_GUARD = re.compile(
    r"#if !defined\(TORCH_STABLE_ONLY\).*\n|\n#else\n#error \"This file should not be included when.*\n#endif.*"
)
"""What torch's packaging wraps around every header."""
_COPYRIGHT = re.compile(r"copyright|©|all rights reserved|licen[sc]e|redistribution", re.IGNORECASE)


def tidy(text: str) -> str:
    """Unix line ends, no byte-order mark, no trailing blanks, tabs as 4 spaces, at most 2 blank lines in a row."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").replace("\f", "\n")
    lines = (line.rstrip() for line in text.expandtabs(4).split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def python_blocks(text: str) -> list[str]:
    """Top-level pieces of a Python file, docstrings and licence comments left out.

    Docstrings are the domain of `docstring_blocks`. Raises SyntaxError where the file is no Python.
    """
    text = re.sub(r"(^#.*\n)+", _drop_licence, tidy(text) + "\n", flags=re.MULTILINE)
    lines = text.split("\n")
    tree = _parse(text)
    for node in ast.walk(tree):
        docstring = _docstring_node(node)
        if docstring is not None and len(node.body) > 1:  # type: ignore[attr-defined]
            for number in range(docstring.lineno - 1, docstring.end_lineno or docstring.lineno):
                lines[number] = "\0"
    starts = {1} | {
        min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", []))])
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    blocks: list[list[str]] = []
    for number, line in enumerate(lines, start=1):
        if number in starts:
            blocks.append([])
        if line != "\0":
            blocks[-1].append(line)
    return _kept(tidy("\n".join(block)) for block in blocks)


def cpp_blocks(text: str) -> list[str]:
    """Pieces of a C++ header between blank lines that end at the left margin, licence comments left out."""
    text = re.sub(r"/\*.*?\*/|(^[ \t]*//[^\n]*\n)+", _drop_licence, tidy(text) + "\n", flags=re.S | re.M)
    text = tidy(_CPP_GUARD.sub("", text))
    blocks: list[list[str]] = [[]]
    for line in text.split("\n"):
        previous = blocks[-1][-2:]
        if not _indented(line) and previous and not previous[-1].strip() and line[:1] not in "}":
            blocks.append([])
        blocks[-1].append(line)
    return _kept("\n".join(block).strip("\n") for block in blocks)


def docstring_blocks(text: str) -> list[str]:
    """Docstrings of a Python file in order, dedented; also those handed to numpy's `add_newdoc` calls.

    Docstrings under 200 characters are left out, labels more than prose, and those that state a copyright.
    """
    found: list[tuple[int, str]] = []
    for node in ast.walk(_parse(text)):
        docstring = _docstring_node(node)
        if docstring is not None:
            found.append((docstring.lineno, str(docstring.value)))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "add_newdoc":
            strings = [s for a in node.args for s in ast.walk(a) if isinstance(s, ast.Constant)]
            found.extend((s.lineno, s.value) for s in strings if isinstance(s.value, str))
    return _kept(
        _dedent(value) for _, value in sorted(found) if len(value) >= 200 and "copyright" not in value.lower()
    )


def verse_blocks(text: str) -> list[str]:
    """Stanzas and speeches: what stands between blank lines, without the edition's line numbers."""
    text = re.sub(r"[ \t]{3,}\d+[ \t]*$", "", tidy(text), flags=re.MULTILINE)
    return _kept(re.split(r"\n{2,}", text))


def translation_blocks(text: str) -> list[str]:
    """The translated strings (msgstr) of a gettext .po file, in order; the file's header is left out.

    Fuzzy entries and strings without three letters are left out.
    """
    strings: list[str] = []
    for entry in re.split(r"\n\s*\n", tidy(text)):
        if re.search(r"^#,.*fuzzy", entry, re.MULTILINE) or re.search(
            r'^msgid ""\nmsgstr', entry, re.MULTILINE
        ):
            continue
        for match in re.finditer(r'^msgstr(?:\[\d+\])? ((?:".*"\n?)+)', entry, re.MULTILINE):
            quoted = "".join(re.findall(r'^"(.*)"$', match[1], re.MULTILINE))
            unescaped = re.sub(r"\\(.)", lambda m: {"n": "\n", "t": " "}.get(m[1], m[1]), quoted)
            strings.append(tidy(unescaped).strip())
    return _kept(s for s in strings if sum(c.isalpha() for c in s) >= 3)


def row_blocks(text: str) -> list[str]:
    """The rows of a comma-separated table without its header; only fields with a comma or a quote are quoted."""
    target = io.StringIO()
    csv.writer(target, lineterminator="\n").writerows(list(csv.reader(tidy(text).split("\n")))[1:])
    return _kept(target.getvalue().split("\n"))


EXTRACTORS: dict[str, tuple[Callable[[str], list[str]], str]] = {
    "python": (python_blocks, "\n\n\n"),
    "cpp": (cpp_blocks, "\n\n"),
    "docstrings": (docstring_blocks, "\n\n\n"),
    "verse": (verse_blocks, "\n\n"),
    "translations": (translation_blocks, "\n"),
    "rows": (row_blocks, "\n"),
}
"""Per kind of file: the extractor, and what `pack` puts between two blocks."""


def pack(blocks: Iterable[str], separator: str) -> Iterator[str]:
    """Join neighbouring blocks into documents of about `DOCUMENT_BYTES` bytes (UTF-8).

    All documents lie between `LEAST_BYTES` and `MOST_BYTES` plus `LEAST_BYTES`, save that blocks which are
    shorter in all give one short document.
    """
    document, size = "", 0
    waiting: str | None = None  # the last full document: a short remainder may still join it
    for block in _cut(blocks):
        block_bytes = len(block.encode())
        if size >= LEAST_BYTES and size + block_bytes > DOCUMENT_BYTES:
            if waiting is not None:
                yield waiting
            waiting, document, size = document, "", 0
        document = document + separator + block if document else block
        size += block_bytes + (len(separator) if size else 0)
    if waiting is not None and document and size < LEAST_BYTES:
        yield waiting + separator + document
        return
    yield from (d for d in (waiting, document) if d)


def _cut(blocks: Iterable[str]) -> Iterator[str]:
    for block in blocks:
        if len(block.encode()) <= MOST_BYTES:
            yield block
            continue
        piece: list[str] = []
        size = 0
        for line in block.split("\n"):
            if piece and size + len(line.encode()) > DOCUMENT_BYTES:
                yield "\n".join(piece)
                piece, size = [], 0
            piece.append(line)
            size += len(line.encode()) + 1
        yield "\n".join(piece)


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes of other people's sources
        return ast.parse(text)


def _docstring_node(node: ast.AST) -> ast.Constant | None:
    if (
        not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        or not node.body
    ):
        return None
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return first.value
    return None


def _dedent(docstring: str) -> str:
    """As inspect.cleandoc, whose treatment of tabs and blanks differs between versions of Python."""
    first, *rest = tidy(docstring).split("\n")
    margin = min((len(line) - len(line.lstrip()) for line in rest if line.strip()), default=0)
    return tidy("\n".join([first.lstrip(), *(line[margin:] for line in rest)]))


def _drop_licence(comment: re.Match[str]) -> str:
    return "" if _COPYRIGHT.search(comment[0]) else comment[0]


def _indented(line: str) -> bool:
    return not line.strip() or line[0] in " \t"


def _kept(blocks: Iterable[str]) -> list[str]:
    return [block for block in (b.strip("\n") for b in blocks) if block.strip()]
