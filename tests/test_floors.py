"""The code base itself: imports point downwards, no cycles, no file over 400 lines, light start-up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "engine" / "velopath"
FLOORS: dict[int, tuple[str, ...]] = {
    0: ("errors", "urls", "domains", "config", "config_change"),
    1: (
        "gain",
        "shares",
        "rule_state",
        "velocity",
        "baselines",
        "rivals",
        "filters",
        "signals",
        "configured",
        "alarms",
        "controllers",
        "law",
        "targets",
        "schedule",
        "lineage",
        "plan",
        "health",
        "forecast",
        "proxy_points",
    ),
    2: (
        "_core",
        "durable",
        "mds",
        "remote",
        "cache",
        "shard_journal",
        "token_counts",
        "audit",
        "stream",
        "stream_state",
        "pack",
        "stream_order",
        "replay",
        "retrace",
        "tokenizer",
        "workers",
        "prepare",
        "inspection",
        "corpus",
        "metric_record",
        "runfolder",
        "runlineage",
        "runconfig",
        "runhealth",
        "alarm",
        "runchange",
        "rollback",
        "retention",
        "version_diff",
        "plots",
    ),
    3: (
        "kernels",
        "loss",
        "recompute",
        "model",
        "hf",
        "optim",
        "dist",
        "sharding",
        "tensor_files",
        "checkpoint",
        "phases",
        "train_step",
        "environment",
    ),
    4: (
        "evaluate",
        "session",
        "meter",
        "profiling",
        "machine",
        "loop",
        "run",
        "segments",
        "control",
        "alarm_watch",
        "proxy",
        "export",
        "model_card",
        "downstream",
        "unattended",
        "sampler_speed",
        "verification",
        "report",
    ),
    5: ("adapters", "cli", "demo", "__main__"),
}
"""Floor -> top-level modules (a package counts whole; a name also stands for name_*)."""
NO_TORCH_BELOW = 3
FREE = ("__init__",)


def floor_of(module: str) -> int:
    """Floor of a module name below velopath, by its first part; longer names win over their prefixes."""
    first = module.split(".")[0]
    matches = [
        (len(name), floor)
        for floor, names in FLOORS.items()
        for name in names
        if first == name or first.startswith(f"{name}_")
    ]
    if not matches:
        pytest.fail(f"module velopath.{module} stands on no floor; add it to FLOORS")
    return max(matches)[1]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name not in FREE:
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    """Modules below velopath that a file imports, lazily or not, but for type checking."""
    tree = ast.parse(path.read_text())
    skipped = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("velopath"):
            rest = node.module.removeprefix("velopath").lstrip(".")
            found |= {rest} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("velopath.") for a in node.names if a.name.startswith("velopath.")}
    return {name for name in found if name != "__version__"}


def test_imports_point_downwards() -> None:
    wrong = [
        f"{name} (floor {floor_of(name)}) imports {target} (floor {floor_of(target)})"
        for name, path in modules().items()
        for target in imports(path)
        if floor_of(target) > floor_of(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    known = modules()
    graph = {
        name: {t if t in known else t.rsplit(".", 1)[0] for t in imports(path)} & set(known)
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(graph[name] - {name}):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_no_torch_below_the_machine() -> None:
    for name, path in modules().items():
        if floor_of(name) < NO_TORCH_BELOW:
            tree = ast.parse(path.read_text())
            names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            assert not {n for n in names if n.split(".")[0] in ("torch", "triton")}, name


@pytest.mark.parametrize("folder", ["csrc", "engine", "tests", "benchmarks"])
def test_no_file_over_400_lines(folder: str) -> None:
    paths = [
        p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".pyi", ".cpp", ".h", ".css", ".js")
    ]
    long = {str(p.relative_to(ROOT)): n for p in paths if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"split by noun: {long}"


def test_only_bindings_know_python() -> None:
    for path in (ROOT / "csrc").glob("*"):
        text = path.read_text()
        assert "torch/" not in text, path.name
        assert path.name.startswith("bind") or ("pybind11" not in text and "Python.h" not in text), path.name


@pytest.mark.parametrize(
    "code",
    [
        "import velopath",
        "import velopath; velopath.open_sampler",
        "import velopath; velopath.compare_costs([1000] * 4, 0.6); velopath.LrPath.main(peak=1e-3)",
        "from velopath.cli.app import app",
    ],
)
def test_starts_without_torch(code: str) -> None:
    check = "import sys; assert not {'torch', 'triton', 'transformers'} & set(sys.modules), 'imports torch'"
    done = subprocess.run([sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
