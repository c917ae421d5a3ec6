"""The README: its Python runs, its config loads, its links and folders exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from velopath.config import load_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_of_the_readme_runs(data: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    scope: dict[str, object] = {}
    exec(compile(code.replace("data/2026q1", str(data)), "README.md", "exec"), scope)
    saved, state = scope["saved"], scope["state"]
    assert saved["step"] == 100  # type: ignore[index]
    assert state.updates == 4  # type: ignore[attr-defined]
    assert sum(scope["sampler"].weights.values()) == pytest.approx(1)  # type: ignore[attr-defined]


def test_the_example_config_is_valid() -> None:
    config = load_config(ROOT / "docs" / "run.yaml")
    assert list(config.data.slices) == ["2026q1", "2026q2"]


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists(), link


def test_the_tree_names_every_module() -> None:
    tree = README.split("## What is where")[1].split("```")[1]
    named = set(re.findall(r"[\w_]+", tree))
    modules = {p.stem for p in (ROOT / "engine" / "velopath").glob("*") if p.suffix == ".py" or p.is_dir()}
    parts = {
        m for m in modules if any(m.startswith(f"{other}_") for other in named)
    }  # stream_state is stream's
    assert not {m for m in modules if not m.startswith("_")} - named - parts
