"""What the report says about the controller beside its figures: small gaps, idle slices, shadow mode, alarms."""

from __future__ import annotations

from velopath.report.record import RunRecord, Segment
from velopath.report.tables import Safe, escape, table


def velocity_notes(record: RunRecord) -> str:
    """Why some velocities are not a domain's own; empty where all are."""
    main = record.main
    if main is None:
        return ""
    notes = ""
    if flagged := sorted({d for c in main.controls for d in c.get("flagged") or ()}):
        names = ", ".join(escape(d) for d in flagged)
        notes += (
            f"<p class=quiet>Open circles: the gap between start and target of {names} is too small for a velocity "
            "of its own; the mean of the others is used.</p>"
        )
    if idle := [n for n, a, b in record.slice_starts if _all_flagged(main, a, b)]:
        notes += (
            f"<p class=quiet>In {', '.join(map(escape, idle))} every gap is too small, so there are no others: V is 1 "
            "for all and the weights hold.</p>"
        )
    return notes


def alarms_section(record: RunRecord) -> Safe:
    """The alarms of the main path as a table; empty where none was raised."""
    rows: list[list[object]] = [
        [alarm["rule"].replace("_", " "), f"{r['step']:,}", alarm["text"]]
        for r in (record.main.alarms if record.main else ())
        for alarm in r["alarms"]
    ]
    if not rows:
        return Safe()
    return Safe("<h3>Alarms</h3>" + table(["rule", "step", "what was seen"], rows, words=(0, 2)))


def _all_flagged(main: Segment, start: int, end: int) -> bool:
    """Whether the main path has updates in these steps, and no domain had a velocity of its own at any of them."""
    updates = [c for c in main.controls if start < c["step"] <= end and c.get("velocity")]
    return bool(updates) and all(len(c.get("flagged") or ()) == len(c["weights"]) for c in updates)
