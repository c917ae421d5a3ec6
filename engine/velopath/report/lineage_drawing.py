"""The lineage as a drawing: the main path as a line, each version leaving it where it was cut."""

from __future__ import annotations

from velopath.report.record import BASE, PROXY, RunRecord
from velopath.report.tables import Safe, escape

WIDTH, LEFT, RIGHT, TOP, ROW = 980, 40, 150, 34, 46


def lineage_drawing(record: RunRecord) -> Safe | None:
    """An SVG of main path and versions by step; None before the main path has begun.

    Versions whose spans overlap stand on rows of their own.
    """
    main = record.main
    if main is None:
        return None
    end = max(s.end for s in record.walk) or 1

    def x(step: int) -> float:
        return round(LEFT + step / end * (WIDTH - LEFT - RIGHT), 1)

    rows: list[int] = []  # the last step on each row
    parts: list[str] = []
    for v in record.versions:
        stop = v.branch_step + v.steps
        row = next((i for i, taken in enumerate(rows) if taken + 0.16 * end <= v.branch_step), len(rows))
        rows[row : row + 1] = [stop]
        y, a, b = TOP + ROW * (row + 1), x(v.branch_step), x(stop)
        parts.append(
            f'<path d="M{a} {TOP} C{a + 14} {TOP} {a + 6} {y} {a + 26} {y} L{b} {y}" fill="none" '
            'stroke="var(--accent)" stroke-width="2.2"/>'
            f'<circle cx="{a}" cy="{TOP}" r="4.5" fill="var(--paper)" stroke="var(--accent)" stroke-width="2"/>'
            f'<circle cx="{b}" cy="{y}" r="5.5" fill="var(--accent)"/>'
            f'<text x="{b + 12}" y="{y + 1}"><tspan font-weight="600">{escape(v.name)}</tspan></text>'
            f'<text class="quiet" x="{b + 12}" y="{y + 17}">{v.steps:,} steps from {v.branch_step:,}</text>'
        )
    root = "base model" if BASE in record.segments else "start"
    main_line = (
        f'<line x1="{x(0)}" y1="{TOP}" x2="{x(main.end)}" y2="{TOP}" stroke="var(--ink)" stroke-width="2.4"/>'
        f'<circle cx="{x(0)}" cy="{TOP}" r="5" fill="var(--ink)"/>'
        f'<circle cx="{x(main.end)}" cy="{TOP}" r="4" fill="var(--ink)"/>'
        f'<text class="quiet" x="{x(0) - 6}" y="{TOP - 14}">{root}</text>'
    )
    if main.end > 0.3 * end:
        middle = x(main.end // 2)
        text = f"main, {main.end:,} steps"
        main_line += f'<text class="quiet" x="{middle}" y="{TOP - 14}" text-anchor="middle">{text}</text>'
    starts = "".join(
        f'<line x1="{x(s)}" y1="{TOP - 7}" x2="{x(s)}" y2="{TOP + 7}" stroke="var(--quiet)"/>'
        f'<text class="quiet" x="{x(s)}" y="{TOP - 14}" text-anchor="middle">{escape(name)}</text>'
        for name, s, _ in record.slice_starts[1:]
        if s <= main.end
    )
    height = TOP + ROW * len(rows) + 30
    what = f"Lineage: main path and {len(record.versions)} versions"
    proxies = " A proxy trunk for the targets ran beside it." if PROXY in record.segments else ""
    return Safe(
        f'<svg class="lineage" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{what}.{proxies}">'
        f"{''.join(parts)}{main_line}{starts}</svg>"
    )
