"""`velopath inspect`: what prepared data holds, and whether it is sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from velopath.inspection import DomainReport, Inspection
    from velopath.inspection_separation import Separation

_BAR_CELLS = 32
_MOST_COLUMNS = 10
_CLOSEST_SHOWN = 20
_EIGHTHS = " ▏▎▍▌▋▊▉"


def inspect(
    data: Annotated[str, typer.Argument(help="folder or URL made by prepare, or one of MDS folders")],
    domain: Annotated[str | None, typer.Option("--domain", "-d", help="this domain only")] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-s", min=0, help="documents to decode per domain")
    ] = 0,
    characters: Annotated[int, typer.Option(min=1, help="characters shown of each sample")] = 400,
    verify: Annotated[
        bool, typer.Option("--verify", help="read every sample: hashes, bounds, counts")
    ] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="processes; default: all cores")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the tables")] = False,
) -> None:
    """Show domains, document lengths, tokens, how far domains lie apart, and sample documents; check all with --verify.

    Domains that are too much alike make velocities meaningless; the table of divergences and the sentence below it
    say whether yours are.

    Example: velopath inspect data/ --samples 2 --domain verse

    Example: velopath inspect data/ --verify (exit code 3 where something is wrong)

    Example: velopath inspect s3://bucket/data (credentials from the environment, such as AWS_ACCESS_KEY_ID)
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from velopath.errors import DataError
    from velopath.inspection import inspect_data

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json) as bars:
        bar = bars.add_task("checking shards" if verify else "reading shards", total=None)
        found = inspect_data(
            data,
            domain=domain,
            samples=samples,
            verify=verify,
            processes=processes,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    if as_json:
        import json

        typer.echo(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        _show(Console(), found, characters)
    if found.problems:
        raise DataError(f"{len(found.problems)} problems, the first: {found.problems[0]}", path=found.folder)


def _show(console: Console, found: Inspection, characters: int) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    vocabulary = f", {found.vocab_size:,} entries" if found.vocab_size is not None else ""
    console.print(
        f"{found.folder}: {found.dtype} tokens{vocabulary}, end-of-text id {found.eos}", highlight=False
    )
    # Only the licence may wrap, so that numbers stay whole in a narrow terminal.
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("domain", no_wrap=True)
    for title in ("docs", "tokens", "share", "B/token", "median", "mean", "longest", "held out"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("licence", overflow="fold")
    for report in found.domains:
        lengths = report.lengths
        table.add_row(
            report.name,
            f"{report.documents:,}",
            _count(report.tokens),
            f"{100 * report.share:.1f}%" if report.share is not None else "",
            f"{report.bytes_per_token:.2f}" if report.bytes_per_token is not None else "",
            f"{lengths.median:,.0f}",
            f"{lengths.mean:,.0f}",
            f"{lengths.longest:,}",
            _count(report.heldout_tokens),
            report.licence or "",
        )
    console.print(table)
    for report in found.domains:
        _show_lengths(console, report)
    for report in found.domains:
        _show_tokens(console, report, found)
    if found.separation is not None:
        _show_separation(console, found.separation, [report.name for report in found.domains])
    for report in found.domains:
        for number, text in enumerate(report.samples):
            cut = text[:characters] + (" ..." if len(text) > characters else "")
            console.rule(f"{report.name}, document {number}, {len(text):,} characters", align="left")
            console.print(cut, highlight=False, markup=False)
    if found.problems is not None:
        for problem in found.problems:
            console.print(problem, highlight=False, markup=False, style="red")
        if not found.problems:
            console.print("verified: every hash, bound, token id and count is right")


def _count(number: int | None) -> str:
    return f"{number:,}" if number is not None else ""


def _show_lengths(console: Console, report: DomainReport) -> None:
    """Bars of the documents by length, a power of two each."""
    lengths = report.lengths
    if not lengths.histogram:
        return
    part = f", from {lengths.shards} of {lengths.of} shards" if lengths.shards < lengths.of else ""
    console.print(f"\n{report.name}: documents by length in tokens{part}", highlight=False)
    most = max(lengths.histogram)
    first = next(i for i, count in enumerate(lengths.histogram) if count)
    for power, count in list(enumerate(lengths.histogram))[first:]:
        console.print(f"{2**power:>10,} {bar(count / most)} {count:,}", highlight=False)


def _show_tokens(console: Console, report: DomainReport, found: Inspection) -> None:
    """Bars of the tokens by the frequency rank of their id, and the commonest ones."""
    use = report.token_use
    if use is None or not use.tokens:
        return
    of = f" of {found.vocab_size:,}" if found.vocab_size is not None else ""
    console.print(
        f"\n{report.name}: {use.used:,}{of} ids in use, {use.entropy:.2f} bits a token; tokens by their id's rank",
        highlight=False,
    )
    for power, share in enumerate(use.by_rank):
        first = 1 if power == 0 else 10**power + 1
        last = min(10 ** (power + 1), use.used)
        console.print(f"{f'{first:,}-{last:,}':>14} {bar(share)} {100 * share:.1f}%", highlight=False)
    shown = [f"{found.commonest.get(i, str(i))!r} {100 * share:.1f}%" for i, share in use.commonest]
    console.print("commonest: " + ", ".join(shown), highlight=False, markup=False)


def _show_separation(console: Console, separation: Separation, names: list[str]) -> None:
    """Divergences as a table in shades, or the closest pairs where there are many domains; and what they mean."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    console.print(
        "\nhow far domains lie apart: divergence of their tokens in bits, 0 the same, 1 none in common"
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if len(names) > _MOST_COLUMNS:
        for title in ("closest pairs", "", "bits", "shared documents"):
            table.add_column(title, no_wrap=True)
        for pair in sorted(separation.pairs, key=lambda p: p.divergence)[:_CLOSEST_SHOWN]:
            table.add_row(pair.first, pair.second, f"{pair.divergence:.3f}", f"{pair.shared:,}")
    else:
        table.add_column("", no_wrap=True)
        for name in names[1:]:
            table.add_column(name, justify="right", no_wrap=True)
        bits = {(p.first, p.second): p.divergence for p in separation.pairs}
        for k, first in enumerate(names[:-1]):
            cells = [bits.get((first, second)) if second in names[k + 1 :] else None for second in names[1:]]
            table.add_row(
                first, *(Text("") if c is None else Text(f"{c:.2f}", style=_shade(c)) for c in cells)
            )
    console.print(table)
    for sentence in separation.advice:
        console.print(sentence, highlight=False, markup=False)
    console.print()


def _shade(bits: float) -> str:
    """Red for domains that are too close, yellow for close ones, green from there on."""
    from velopath.inspection_separation import ALIKE_BITS, CLOSE_BITS

    return "bold red" if bits < ALIKE_BITS else "yellow" if bits < CLOSE_BITS else "green"


def bar(share: float) -> str:
    """A bar of `_BAR_CELLS` characters filled to `share` (0 to 1), in eighths; never empty above 0."""
    eighths = round(share * _BAR_CELLS * 8)
    if share > 0:
        eighths = max(1, eighths)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_CELLS)
