"""The figures of the report by section."""

from __future__ import annotations

from velopath.report.domain_figures import (
    domain_loss_figure,
    exposure_figure,
    proposed_figure,
    target_fit_figure,
    velocity_figure,
    weights_figure,
)
from velopath.report.figure import Figure
from velopath.report.path_figures import cost_figure, paths_figure, throughput_figure, training_loss_figure
from velopath.report.record import RunRecord


def figures(record: RunRecord) -> dict[str, list[Figure]]:
    """All figures by section; a section whose records are missing has an empty list."""
    return {
        "paths": _some(paths_figure(record)),
        "training": _some(training_loss_figure(record)),
        "weights": _some(weights_figure(record)),
        "proposed": _some(proposed_figure(record)),
        "velocity": _some(velocity_figure(record)),
        "losses": [f for k in range(len(record.domains)) for f in _some(domain_loss_figure(record, k))],
        "fits": [f for k in range(len(record.domains)) for f in _some(target_fit_figure(record, k))],
        "exposure": _some(exposure_figure(record)),
        "throughput": _some(throughput_figure(record)),
        "cost": _some(cost_figure(record)),
    }


def _some(figure: Figure | None) -> list[Figure]:
    return [figure] if figure is not None else []
