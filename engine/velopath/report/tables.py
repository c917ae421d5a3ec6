"""Tables of the report as HTML. Every cell is escaped unless it is `Safe`."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from velopath.report.figure import epochs_text, tokens_text
from velopath.report.record import RunRecord, VersionRow, mean_loss


class Safe(str):
    """HTML made here, not foreign text: it goes into the page as it is."""


def escape(text: object) -> Safe:
    """Foreign text as HTML."""
    return text if isinstance(text, Safe) else Safe(html.escape(str(text)))


def table(
    head: Sequence[object],
    rows: Sequence[Sequence[object]],
    *,
    words: Collection[int] = (0,),
    kinds: Mapping[int, str] | None = None,
) -> Safe:
    """A table; the columns `words` hold text and the others numbers; `kinds` gives rows a class by index."""

    def row(cells: Sequence[object], tag: str, kind: str = "") -> str:
        shown = (escape("–" if c is None else c) for c in cells)
        inner = "".join(f"<{tag}{'' if i in words else ' class=n'}>{c}</{tag}>" for i, c in enumerate(shown))
        return f"<tr{f' class={kind}' if kind else ''}>{inner}</tr>"

    body = "".join(row(r, "td", (kinds or {}).get(i, "")) for i, r in enumerate(rows))
    return Safe(
        f"<div class=scroll><table><thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def swatch(k: int, name: str) -> Safe:
    """A domain's name with its colour."""
    return Safe(f'<span class=swatch style="background:var(--d{k})"></span> {escape(name)}')


def number(value: object, digits: int = 3) -> str | None:
    """Fixed digits; None stays None."""
    return f"{value:.{digits}f}" if isinstance(value, (int, float)) else None


def change(before: float | None, after: float | None) -> Safe | None:
    """`after - before` in nats, green where the loss fell and red where it rose."""
    if before is None or after is None:
        return None
    delta = after - before
    kind = "good" if delta < -0.0005 else "bad" if delta > 0.0005 else ""
    return Safe(f"<span class='{kind}'>{'−' if delta < 0 else '+'}{abs(delta):.3f}</span>")


def versions_table(record: RunRecord) -> Safe:
    """One row per version: where it left, what it cost, its losses, each with the change since the branch point."""
    head = ["version", "parent", "slice", "steps", "mean", *record.domains]
    if any(v.undecayed for v in record.versions):
        head.append("mean, against undecayed")
    rows = []
    for v in record.versions:
        before = v.before or {}
        cells = [_with_change(v.heldout_loss.get(d), before.get(d)) for d in record.domains]
        name = Safe(f"<b>{escape(v.name)}</b><small>{escape(v.export or 'not exported')}</small>")
        rows.append(
            [
                name,
                v.parent,
                v.slice or None,
                Safe(f"{v.steps:,}<small>{branch_words(record, v)}</small>"),
                _with_change(mean_loss(v.heldout_loss), mean_loss(v.before)),
                *cells,
                change(mean_loss(v.undecayed), mean_loss(v.heldout_loss)),
            ][: len(head)]
        )
    return table(head, rows, words=(0, 1, 2))


def branch_share(record: RunRecord, version: VersionRow) -> float | None:
    """The steps of a version over those of its slice; None where the plan does not know the slice."""
    slices = dict(record.ledger.plan.slices) if record.ledger.plan else {}
    return version.steps / slices[version.slice] if version.slice in slices else None


def branch_words(record: RunRecord, version: VersionRow) -> Safe:
    """Share and shape of a version's branch, as far as they are known."""
    share = branch_share(record, version)
    known = [None if share is None else f"{share:.1%} of its slice", version.shape]
    return escape(", ".join(word for word in known if word))


def _with_change(loss: float | None, before: float | None) -> Safe | None:
    if loss is None:
        return None
    small = change(before, loss)
    return Safe(f"{loss:.3f}" + (f"<small>{small}</small>" if small else ""))


def domains_table(record: RunRecord) -> Safe:
    """One row per domain: losses at the start, aimed at and reached; shares at the start and the end; tokens."""
    facts = record.domain_facts()
    controls = record.main.controls if record.main else ()
    rows = []
    for k, name in enumerate(record.domains):
        f = facts[name]
        shares = [c["weights"].get(name) for c in (controls[:1] + controls[-1:])]
        rows.append(
            [
                swatch(k, name),
                number(f["initial"]),
                number(f["last_loss"]),
                number(f["target"]),
                *([None if s is None else f"{s:.1%}" for s in shares] if len(shares) == 2 else [None, None]),
                tokens_text(f["tokens"] or 0),
                epochs_text(record.epochs(name)),
            ]
        )
    head = [
        "domain",
        "loss at the start",
        "loss now",
        "target",
        "share at the start",
        "share now",
        "tokens read",
        "epochs",
    ]
    return table(head, rows)


def cost_table(record: RunRecord) -> Safe:
    """The ledger: the compared steps, then what stands beside them."""
    ledger, per_step = record.ledger, record.row_tokens
    plan, base = ledger.plan, "beside it: base model"

    def line(name: str, run: int, planned: int | None, compared: bool = True) -> list[object]:
        share = ledger.over_ptfs(run) if compared else None
        return [
            name,
            f"{run:,}",
            f"{planned:,}" if planned is not None else None,
            f"{share:.1%}" if share is not None else None,
            tokens_text(run * per_step) if per_step and name != base else None,
        ]

    rows: list[list[object]] = [
        line("main path", ledger.main_steps, plan.main_steps if plan else None),
        line("branches", ledger.branch_steps, plan.branch_steps if plan else None),
        line("path switching in all", ledger.actual, plan.steps if plan else None),
        line(base, ledger.base_steps, None, compared=False),
        line("beside it: proxy for the targets", ledger.proxy_steps, None, compared=False),
        ["beside it: held-out evaluation", None, None, None, tokens_text(ledger.evaluation_tokens)],
    ]
    head = ["part", "steps run", "steps planned", "of PTFS", "tokens"]
    return table(head, rows, kinds={2: "sum", 3: "aside", 4: "aside", 5: "aside"})


def sources_table(record: RunRecord) -> Safe:
    """Where each domain's text comes from and under which licence."""
    rows = []
    for k, name in enumerate(record.domains):
        parts = [d[name] for d in record.data.values() if name in d]

        def total(key: str, parts: list[Mapping[str, Any]] = parts) -> int:
            return sum(p.get(key) or 0 for p in parts)

        def words(key: str, parts: list[Mapping[str, Any]] = parts) -> str | None:
            return "; ".join(dict.fromkeys(str(p[key]) for p in parts if p.get(key))) or None

        rows.append(
            [
                swatch(k, name),
                words("source"),
                words("licence"),
                tokens_text(total("tokens")),
                f"{total('documents'):,}",
                f"{total('bytes') / 1e6:.1f} MB",
                tokens_text(max((p.get("heldout_tokens") or 0 for p in parts), default=0)),
            ]
        )
    head = ["domain", "source", "licence", "tokens", "documents", "text", "held-out tokens"]
    return table(head, rows, words=(0, 1, 2))


def targets_table(record: RunRecord) -> Safe:
    """One row per domain: the law's prediction, its interval and error, and what to be wary of."""
    targets = record.targets
    rows = []
    for k, name in enumerate(record.domains):
        t = targets.domains.get(name) if targets else None
        if t is None:
            continue
        law = t.law
        constant = f"{law.E:.2f} + " if law and law.law == "three" else ""
        formula = f"{constant}{law.B:.3g} / D^{law.beta:.2f}" if law else "given by hand"
        rows.append(
            [
                swatch(k, name),
                formula,
                number(t.target),
                f"{t.interval[0]:.3f} – {t.interval[1]:.3f}" if t.interval else None,
                number(t.error),
                f"{law.extrapolation(t.tokens):.1f}×" if law and t.tokens else None,
                len(t.points) or None,
            ]
        )
    level = f"{targets.level:.0%} interval" if targets else "interval"
    head = ["domain", "law, D in tokens", "target", level, "leave-last-out error", "extrapolated", "points"]
    return table(head, rows, words=(0, 1))


def target_warnings(record: RunRecord) -> Safe:
    """What to be wary of in the targets, as a list; empty where there is nothing."""
    targets = record.targets
    if targets is None or not targets.warnings:
        return Safe()
    lines = "".join(
        f"<li><b>{escape(name)}</b> {escape('; '.join(t.warnings))}</li>"
        for name, t in targets.domains.items()
        if t.warnings
    )
    return Safe(f"<h3>Warnings of the fit</h3><ul class=notes>{lines}</ul>")
