"""The report of a run: `report.html`, `summary.json` and an overview picture, all from the files of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from velopath.report.html import page
from velopath.report.record import RunRecord, read_run
from velopath.report.tables import branch_share
from velopath.report.times import compute_speed, phase_seconds
from velopath.runfolder import RunFolder


def write_report(run: str | Path) -> Path:
    """Write `report.html`, one file that needs no network, and `summary.json`; return the page's path.

    Works on a run that is still going and on one without targets, versions or moving weights: what is missing
    becomes a sentence. Raises `DataError` when the folder is missing or a file in it is damaged.
    """
    folder = RunFolder(run)
    folder.check_is_run()
    record = read_run(folder)
    folder.write_json("summary.json", summary(record))
    return folder.write_text("report.html", page(record))


def build_summary(run: str | Path) -> dict[str, Any]:
    """Write `summary.json` and return its value (see `summary`). Raises as `write_report`."""
    folder = RunFolder(run)
    folder.check_is_run()
    value = summary(read_run(folder))
    folder.write_json("summary.json", value)
    return value


def summary(record: RunRecord) -> dict[str, Any]:
    """The report's numbers as a JSON value; a number that the run did not record is null.

    - `seconds`: wall time of the run
    - `domains`: name -> `tokens` read on the main path, `initial`, `target`, `last_loss` held out, in nats
    - `weights`: list of `step` and `weights`, one entry per start or push on the main path
    - `versions`: list of `name`, `parent`, `branch_step`, `steps`, `branch_share` (steps over those of its slice),
      `shape` of its decay, `heldout_loss` {domain: nats}, `export` path
    - `cost`: steps run by part, `evaluation_tokens`, and planned and actual (main + branches) over PTFS
    - `sampler_tokens_per_second` of the sampler alone, `data_wait_share` of the loop's time
    - `phase_seconds` of main path and branches, see `velopath.phases`; `flops_per_second` of the model, and `mfu`
    """
    ledger = record.ledger
    _, wait = record.rates(record.walk)
    flops, mfu = compute_speed(record.walk)
    return {
        "seconds": record.seconds,
        "domains": record.domain_facts(),
        "weights": [
            {"step": c["step"], "weights": c["weights"]}
            for c in (record.main.controls if record.main else ())
        ],
        "versions": [
            {
                "name": v.name,
                "parent": v.parent,
                "branch_step": v.branch_step,
                "steps": v.steps,
                "branch_share": branch_share(record, v),
                "shape": v.shape,
                "heldout_loss": dict(v.heldout_loss),
                "export": v.export,
            }
            for v in record.versions
        ],
        "cost": {
            "main_steps": ledger.main_steps,
            "branch_steps": ledger.branch_steps,
            "proxy_steps": ledger.proxy_steps,
            "base_steps": ledger.base_steps,
            "evaluation_tokens": ledger.evaluation_tokens,
            "planned_over_ptfs": ledger.plan.planned_over_ptfs if ledger.plan else None,
            "actual_over_ptfs": ledger.over_ptfs(ledger.actual),
        },
        "sampler_tokens_per_second": record.sampler_tokens_per_second,
        "data_wait_share": wait,
        "phase_seconds": phase_seconds(record.walk),
        "flops_per_second": flops,
        "mfu": mfu,
    }
