"""Where the time of a run went, and how much of the device it used, from its step records."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from velopath.report.figure import tokens_text
from velopath.report.record import RunRecord, Segment
from velopath.report.tables import Safe, table

PHASES = {
    "data": "waiting for data",
    "forward": "forward, with the loss",
    "backward": "backward",
    "optimizer": "clipping and update",
    "control": "controller",
    "evaluate": "held-out evaluation",
    "save": "checkpoints",
}


def phase_seconds(segments: Iterable[Segment]) -> dict[str, float]:
    """Seconds of each phase over all step records; a segment's last save stands in no record of it."""
    spent: dict[str, float] = {}
    for segment in segments:
        for record in segment.steps:
            for phase, seconds in (record.get("phase_seconds") or {}).items():
                spent[phase] = spent.get(phase, 0.0) + seconds
    return spent


def compute_speed(segments: Iterable[Segment]) -> tuple[float | None, float | None]:
    """Model FLOP/s over all ranks, and MFU, both means over the records weighted by their training time."""
    sums: dict[str, list[float]] = {"flops_per_second": [0.0, 0.0], "mfu": [0.0, 0.0]}
    for segment in segments:
        at = segment.start
        for record in segment.steps:
            speed, steps = record.get("tokens_per_second"), record["step"] - at
            at = record["step"]
            for key, pair in sums.items():
                if speed and record.get(key) is not None:
                    seconds = steps * (record.get("tokens") or 0) / speed
                    pair[0] += record[key] * seconds
                    pair[1] += seconds
    found = [total / seconds if seconds else None for total, seconds in sums.values()]
    return found[0], found[1]


def time_table(record: RunRecord) -> Safe:
    """One row per phase: seconds and share of main path and branches; empty for runs of before it was recorded."""
    spent = phase_seconds(record.walk)
    whole = sum(spent.values())
    if not whole:
        return Safe("")
    rows: list[list[Any]] = [
        [words, f"{spent[phase]:,.1f}", f"{spent[phase] / whole:.1%}"]
        for phase, words in PHASES.items()
        if phase in spent
    ]
    flops, mfu = compute_speed(record.walk)
    if flops is not None:
        reached = "of an unknown peak" if mfu is None else f"MFU {mfu:.1%}"
        rows.append([f"model FLOP/s while training: {flops:.3g}", "", reached])
    return table(["main path and branches", "seconds", "share"], rows)


def speed_words(record: RunRecord) -> str:
    """What the section on speed shows, as HTML."""
    words = (
        "Tokens per second of the training loop, and the share of its time spent waiting for the sampler; the "
        '<span style="color:var(--accent)">branches</span> in their own colour.'
    )
    if record.sampler_tokens_per_second is not None:
        words += f" The sampler alone delivered {tokens_text(record.sampler_tokens_per_second)} tokens/s."
    return words
