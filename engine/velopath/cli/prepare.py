"""`velopath prepare`: text per domain -> token shards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from velopath.prepare import Prepared


def prepare(
    out: Annotated[Path, typer.Option("--out", "-o", help="folder to make")],
    tokenizer: Annotated[
        str,
        typer.Option(
            "--tokenizer", "-t", help="a tokenizer.json, or train:SIZE for a byte-level BPE of SIZE entries"
        ),
    ],
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--domain", "-d", metavar="NAME=PATH", help="text of a domain: file, folder or glob; repeat it"
        ),
    ] = None,
    input: Annotated[
        Path | None, typer.Option("--input", "-i", help="folder with one sub-folder or file per domain")
    ] = None,
    field: Annotated[str, typer.Option(help="field or column that holds the text")] = "text",
    separator: Annotated[
        str | None,
        typer.Option(
            help=r"cuts .txt files into documents, such as '\f' or '\n\n\n'; default: a file is one"
        ),
    ] = None,
    heldout: Annotated[float, typer.Option(help="percent of the documents held out, by hash")] = 5.0,
    min_chars: Annotated[int, typer.Option(help="drop documents of fewer characters", min=0)] = 0,
    max_chars: Annotated[int | None, typer.Option(help="drop documents of more characters", min=1)] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(metavar="CODE", help="keep this language (en, de ...) only; repeat it for several"),
    ] = None,
    near_duplicates: Annotated[
        float | None,
        typer.Option(
            metavar="THRESHOLD", help="drop documents this similar (0.1 to 1, Jaccard; 0.8 is common)"
        ),
    ] = None,
    licence: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="licence of a domain, kept in domains.json")
    ] = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TEXT", help="source of a domain, kept in domains.json")
    ] = None,
    eos: Annotated[
        str | None,
        typer.Option(help="end-of-text token; default: the tokenizer's; '' joins documents without one"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="uint16 or uint32; default: the narrower that fits")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", "-p", min=1, help="each uses one core; default: all cores")
    ] = None,
    shard_size: Annotated[int, typer.Option(help="bytes of a shard before compression")] = 1 << 26,
    compression: Annotated[str, typer.Option(help="zstd:LEVEL (1 to 22), or none")] = "zstd:3",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="read the text, print what would be made")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier result in OUT")] = False,
) -> None:
    r"""Tokenise text of several domains into MDS shards, split into train and held-out documents.

    Text is .txt or .jsonl (also .gz or .zst), .parquet, a folder saved by Hugging Face datasets, or an MDS folder
    (text, or tokens to pass on). Exact copies are dropped; hashes of the texts decide split and order. Parquet,
    datasets, --language and --near-duplicates need pip install 'velopath\[corpora]'. A killed run goes on where it was.

    Example: velopath prepare -d code=src.jsonl -d prose=books/ --tokenizer train:2048 --out data/

    Example: velopath prepare --input corpus/ --tokenizer tokenizer.json --separator '\f' --out data/ --dry-run
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from velopath.prepare import prepare as prepare_data

    inputs = _inputs(domain or [], input)
    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    names = {"scan": "reading", "train": "tokenizer", "encode": "encoding", "write": "writing"}
    console = Console(stderr=True)
    with Progress(*columns, console=console) as bars:
        rows = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(names[stage], total=total)
            bars.update(rows[stage], completed=done, total=total)

        made = prepare_data(
            inputs,
            out,
            tokenizer=tokenizer,
            field=field,
            separator=_unescaped(separator),
            heldout_percent=heldout,
            eos=eos,
            dtype=dtype,
            processes=processes,
            shard_size=shard_size,
            compression=None if compression == "none" else compression,
            min_chars=min_chars,
            max_chars=max_chars,
            languages=language or (),
            near_duplicates=near_duplicates,
            licences=_pairs(licence or [], "--licence"),
            sources=_pairs(source or [], "--source"),
            dry_run=dry_run,
            force=force,
            progress=show,
        )
    _show(made)


def _inputs(domains: list[str], folder: Path | None) -> dict[str, list[str | Path]]:
    from velopath.errors import ConfigError
    from velopath.prepare.sources import SUFFIXES

    inputs: dict[str, list[str | Path]] = {}
    if folder is not None:
        if not folder.is_dir():
            raise ConfigError(f"--input {folder} is no folder")
        for path in sorted(folder.iterdir()):
            ending = next((s for s in reversed(SUFFIXES) if path.name.endswith(s)), None)
            if path.name.startswith(".") or not (path.is_dir() or ending):
                continue
            inputs.setdefault(
                path.name if path.is_dir() else path.name.removesuffix(ending or ""), []
            ).append(path)
    for text in domains:
        name, equals, path_text = text.partition("=")
        if not equals or not name or not path_text:
            raise ConfigError(f"--domain {text!r}; expected NAME=PATH, such as code=src.jsonl")
        inputs.setdefault(name, []).append(path_text)
    if not inputs:
        raise ConfigError("no text; give --domain NAME=PATH, once per domain, or --input FOLDER")
    return inputs


def _pairs(given: list[str], option: str) -> dict[str, str]:
    from velopath.errors import ConfigError

    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"{option} {text!r}; expected NAME=TEXT, such as code=MIT")
        pairs[name] = value
    return pairs


def _unescaped(separator: str | None) -> str | None:
    r"""The separator with \n, \r, \t, \f and \\ as a shell passes them turned into characters."""
    if separator is None:
        return None
    for written, meant in ((r"\n", "\n"), (r"\r", "\r"), (r"\t", "\t"), (r"\f", "\f"), (r"\\", "\\")):
        separator = separator.replace(written, meant)
    return separator


def _show(made: Prepared) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("domain", no_wrap=True)
    for title in ("files", "documents", "held out", "dropped", "bytes", "tokens"):
        table.add_column(title, justify="right", no_wrap=True)
    for plan in made.plans:
        tokens = (
            f"about {plan.tokens:,}"
            if made.table is None
            else f"{made.table['domains'][plan.name]['tokens']:,}"
        )
        counts = (
            plan.files,
            len(plan.train),
            len(plan.heldout),
            sum(plan.dropped.values()),
            plan.bytes,
        )
        table.add_row(plan.name, *(f"{n:,}" for n in counts), tokens)
    console.print(table)
    for plan in made.plans:
        if any(plan.dropped.values()):
            console.print(f"{plan.name}: of the documents dropped, {plan.reasons()}", highlight=False)
    if made.table is None:
        needed, free = made.disk_needed / 1e6, made.disk_free / 1e6
        console.print(
            f"would make {made.out}: about {needed:,.0f} MB of disk while it runs, {free:,.0f} MB are free"
        )
    elif len(made.reused) == len(made.plans):
        console.print(f"{made.out} is up to date")
    else:
        again = f"; found finished: {', '.join(made.reused)}" if made.reused else ""
        console.print(f"made {made.out}, {made.vocab_size:,} tokenizer entries{again}")
