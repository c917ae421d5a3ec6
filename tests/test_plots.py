"""Plots are written, in the asked format, and leave matplotlib's global state alone."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from velopath.errors import ConfigError
from velopath.plan import cost_table, make_plan
from velopath.plots import _count_label, _rate_label, _spread, _ticks, plot_lr_paths, plot_plan, plot_targets
from velopath.schedule import LrPath
from velopath.targets import Targets


def written(path: Path) -> bytes:
    content = path.read_bytes()
    assert len(content) > 10_000
    return content


def test_plan(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    png = plot_plan(cost_table([1000] * 4, 0.6), tmp_path / "plan.png")
    assert written(png).startswith(b"\x89PNG")
    svg = written(plot_plan(make_plan({"a": 700, "b": 300}, 0.6), tmp_path / "plan.svg"))
    assert svg.startswith(b"<?xml")
    assert dict(mpl.rcParams) == before


def test_targets(tmp_path: Path) -> None:
    tokens = np.geomspace(1e5, 1e6, 6).tolist()
    curves = {f"d{k}": [(t, 2 + 0.5 * (1e6 / t) ** 0.4) for t in tokens] for k in range(4)}
    assert written(plot_targets(Targets.fit(curves, 4e6), tmp_path / "targets.png"))
    with pytest.raises(ConfigError, match="no fitted targets to draw"):
        plot_targets(Targets.given({"a": 1.0}), tmp_path / "none.png")


def test_lr_paths(tmp_path: Path) -> None:
    main = LrPath.main(3e-3, 50)
    branches = {"v1": main.branch(280, 420), "v2": main.branch(980, 420, shape="knee")}
    assert written(plot_lr_paths(main, branches, tmp_path / "rates.png"))
    assert written(plot_lr_paths(main, {}, tmp_path / "main.png"))


def test_labels() -> None:
    assert [_count_label(v) for v in (0, 950, 8000, 10_000, 1.5e6, 2e9)] == [
        "0",
        "950",
        "8,000",
        "10k",
        "1.5M",
        "2G",
    ]
    assert [_rate_label(v) for v in (0, 3e-4, 2.4e-3)] == ["0", "3e-4", "2.4e-3"]
    assert _ticks(35e3, 1.4e6) == [5e4, 1e5, 2e5, 5e5, 1e6]
    assert _ticks(1e4, 1e8) == [1e4, 1e5, 1e6, 1e7, 1e8]
    upper, lower = _spread([0.5, 0.48], [0.1, 0.1])
    assert upper - lower == pytest.approx(0.1)
