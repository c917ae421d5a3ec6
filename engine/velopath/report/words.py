"""What the report says about its own reach, by the scale of the run."""

from __future__ import annotations

from velopath.report.figure import tokens_text
from velopath.report.record import RunRecord

SMALL_SLICE_TOKENS = 20_000_000
"""Below this many tokens a slice the run counts as small (our study's slices were 0.3 and 1.5 million)."""


def limits_section(record: RunRecord) -> str:
    """The section "What this scale can and cannot show"."""
    longest = max((end - start for _, start, end in record.slice_starts), default=0) * record.row_tokens
    small = longest < SMALL_SLICE_TOKENS
    size = f" Its longest slice has {tokens_text(longest)} tokens." if longest else ""
    lead = f"This is one run with one seed and one data order.{size}"
    can = [
        "The mechanics: weights follow the velocities, every version starts from a main-path checkpoint and decays "
        "completely, the main path goes on at its peak rate.",
        "The cost: steps are counted as they were run, and compared with what retraining or continuing would take. "
        "These numbers are exact at any scale.",
        "The equivalence: with the same data order and schedule a version is the same model as one trained from "
        "scratch. That holds bit for bit and is tested, not estimated.",
        "What limits speed here: throughput, and how long training waits for data.",
    ]
    cannot = [
        "Which method reaches the lower loss. The report ranks no methods: the arms to compare with were not run.",
        "Whether moving weights beat good fixed ones. That takes paired runs over several data orders, with proxies "
        "and evaluations counted in.",
        "Whether the targets are right. They are extrapolations, and the shares that the proxy assumed shape them "
        "more than the rule that follows them does.",
    ]
    if small:
        cannot[:1] = [
            "Which method reaches the lower loss. In our study of a 0.16 M-parameter model, reading the same data in "
            "another order moved a retrained model by 0.15 nats, more than the methods differ; at 0.3 M tokens a "
            "slice even the undecayed main path came out ahead, because at such lengths time at a high rate matters "
            "more than decay.",
        ]
        cannot[1] = (
            "Whether moving weights beat good fixed ones. In the same study uniform weights left a rule little to "
            "win (about 0.01 nats in the mean), and the rule as published did not beat them."
        )
    return (
        '<section id="limits"><h2>What this scale can and cannot show</h2>'
        f"<p>{lead}</p><div class=columns><div><h3>It shows</h3>{_list(can)}</div>"
        f"<div><h3>It does not show</h3>{_list(cannot)}</div></div></section>"
    )


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{i}</li>" for i in items) + "</ul>"
