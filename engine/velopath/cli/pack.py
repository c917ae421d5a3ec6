"""`velopath pack`: bins of whole documents, computed ahead and measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pack(
    data: Annotated[str, typer.Argument(help="folder or URL made by prepare, or one of MDS folders")],
    row_tokens: Annotated[int, typer.Option("--row-tokens", "-t", min=1, help="inputs of a row, T")] = 2048,
    bin_shards: Annotated[
        int | None,
        typer.Option("--bin-shards", "-g", min=1, help="bins from so many shards each; default: all"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="for fetched and inflated shards, and bins where DATA cannot be written"),
    ] = None,
    cache_limit: Annotated[
        str | None, typer.Option(help="largest size of its shards, such as 50GB; default: no limit")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Pack documents whole into rows of T + 1 tokens and store the bins beside the shards.

    `open_sampler(..., packing="best_fit")` uses them, and does the same where it finds none. Documents of more than
    T + 1 tokens are cut; "cut by concat" is the share that rows of joined documents would cut.

    An order in windows of shards (order="windowed", the default of remote data) needs bins whose documents come from
    few neighbouring shards: --bin-shards 1 is what it takes unless told otherwise. They pad a little more, and cut no
    more; "padding, whole" is what bins over the whole domain would pad.

    Example: velopath pack data/2026q1 --row-tokens 4096

    Of remote data every shard is fetched once, unless bins stand beside them: pack data before you upload them.

    Example: velopath pack data/2026q1 -t 4096 --bin-shards 1

    Example: velopath pack s3://bucket/2026q1 -t 4096 --bin-shards 1 --cache-limit 50GB
    """
    from velopath.cache import Cache, parse_size
    from velopath.pack import load_bins
    from velopath.stream_data import domain_folders, end_of_text, open_domains

    folders = domain_folders(data)
    eos = end_of_text(folders, None)
    shards = Cache(cache, None if cache_limit is None else parse_size(cache_limit))
    found = {
        name: load_bins(domain, row_tokens, eos, bin_shards=bin_shards or 0, cache=shards)
        for name, domain in open_domains(folders, eos, cache=shards).items()
    }
    facts = {
        name: {
            "documents": bins.documents,
            "rows": bins.rows,
            "tokens": bins.tokens,
            "truncated_share": bins.truncated_share,
            "cut_by_concat": bins.cut_by_concat,
            "padding_share": bins.padding_share,
            "whole_padding_share": bins.whole_padding_share,
            "file": str(bins.path),
        }
        for name, bins in found.items()
    }
    if as_json:
        import json

        head = {"row_tokens": row_tokens, "eos": eos, "bin_shards": bin_shards}
        typer.echo(json.dumps(head | {"domains": facts}, indent=2))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("domain", no_wrap=True)
    compared = ["padding, whole"] if bin_shards else []
    for title in ("docs", "tokens", "rows", "truncated", "cut by concat", "padding", *compared):
        table.add_column(title, justify="right", no_wrap=True)
    for name, bins in found.items():
        table.add_row(
            name,
            f"{bins.documents:,}",
            f"{bins.tokens:,}",
            f"{bins.rows:,}",
            f"{bins.truncated_share:.2%}",
            f"{bins.cut_by_concat:.2%}",
            f"{bins.padding_share:.3%}",
            *[f"{bins.whole_padding_share:.3%}" for _ in compared],
        )
    Console().print(table)
