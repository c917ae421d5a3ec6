"""Health: every rule on curves made by hand, and the command on a run, its exit codes and its alarm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from commands import velopath
from small_run import write_config
from velopath import health
from velopath.health import Finding, Limits
from velopath.runfolder import RunFolder
from velopath.runhealth import run_health

LIMITS = Limits()


def level(found: list[Finding], rule: str, domain: str = "") -> str:
    return next(f.level for f in found if (f.rule, f.domain) == (rule, domain))


def main_path(
    losses: list[float], training: list[float] | None = None, norms: list[float] | None = None
) -> list[Finding]:
    curve = [(50 * k, loss) for k, loss in enumerate(losses)]
    flat = [3.0 + 0.01 * (k % 3) for k in range(60)]
    return health.before(
        {"code": curve},
        list(enumerate(training or flat)),
        list(enumerate(norms or [1.0] * 60)),
        {"code": {"tokens": 60, "epochs": 0.5}, "prose": {"tokens": 40, "epochs": 0.2}},
        LIMITS,
    )


def test_a_path_that_learns_is_fit_to_branch() -> None:
    found = main_path([4.0, 3.8, 3.7, 3.6, 3.55, 3.5, 3.45])
    assert health.verdict(found) == "ok"
    assert {f.rule for f in found} == {"rise", "from_best", "spike", "gradient", "diversity", "epochs"}


@pytest.mark.parametrize(("last", "expected"), [(3.05, "ok"), (3.12, "warn"), (3.3, "warn"), (3.5, "stop")])
def test_a_domain_that_is_forgotten_alarms(last: float, expected: str) -> None:
    found = main_path([4.0, 3.0, 3.0, 3.0, 3.0, 3.0, last])
    assert level(found, "from_best", "code") == expected
    assert next(f for f in found if f.rule == "from_best").text.endswith("above its best, 3.000 at step 50")


@pytest.mark.parametrize(("last", "expected"), [(3.04, "ok"), (3.06, "warn"), (3.21, "stop")])
def test_a_rising_loss_alarms(last: float, expected: str) -> None:
    assert level(main_path([3.0] * 6 + [last]), "rise", "code") == expected
    assert not [f for f in main_path([3.0, last]) if f.rule == "rise"]  # too short a record for a trend


def test_spikes_and_gradients() -> None:
    spiky = [3.0] * 40 + [3.7] + [3.0] * 19
    assert level(main_path([3.0], training=spiky), "spike") == "warn"
    assert level(main_path([3.0], training=[3.0] * 40 + [6.0]), "spike") == "stop"
    assert level(main_path([3.0], norms=[1.0] * 40 + [6.0]), "gradient") == "warn"
    assert level(main_path([3.0], norms=[1.0] * 40 + [60.0]), "gradient") == "stop"


def test_exposure() -> None:
    def read(tokens: list[float], epochs: float = 1.0) -> list[Finding]:
        return health.before(
            {}, [], [], {f"d{k}": {"tokens": t, "epochs": epochs} for k, t in enumerate(tokens)}, LIMITS
        )

    assert level(read([1, 1, 1, 1]), "diversity") == "ok"
    assert level(read([97, 1, 1, 1]), "diversity") == "warn"  # exp(0.17) / 4 = 0.29
    assert level(read([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), "diversity") == "stop"
    assert level(read([1, 1], epochs=4.5), "epochs", "d0") == "warn"
    assert read([]) == []


def test_a_decay_that_does_not_pay() -> None:
    def ask(gain: float, final: float = 0.0) -> list[Finding]:
        return health.during(gain, 0.2, 90, 100, LIMITS, final_rate=final, peak=1e-3)

    assert [level(ask(g), "payback") for g in (0.15, 0.05, -0.1)] == ["ok", "warn", "stop"]
    assert [level(ask(0.2, r), "complete") for r in (0.0, 1e-4, 2e-4)] == ["ok", "ok", "warn"]
    assert not [f for f in health.during(0, 0, 1, 9, LIMITS, final_rate=0, peak=1) if f.rule == "payback"]


def test_what_a_version_gained_and_lost() -> None:
    own, parent, previous = {"a": 3.0, "b": 2.0}, {"a": 3.2, "b": 1.95}, {"b": 1.7}
    found = health.after(own, parent, previous, LIMITS, previous_name="v1")
    assert [level(found, "gain", d) for d in "ab"] == ["ok", "warn"]
    assert level(found, "regression", "b") == "stop"
    assert [f.text for f in found if f.rule == "regression"] == ["b: 2.000 nats, +0.300 from v1"]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("health")
    config = write_config(root / "run.yaml", data, control__controller="static")
    done = velopath("train", config, "--run", root / "run", "--versions")
    assert done.code == 0, done.err
    return root / "run"


def test_before_during_and_after_on_a_run(run: Path) -> None:
    folder = RunFolder(run)
    assert (run_health(folder).stage, run_health(folder).name) == ("before", "main")
    late = run_health(folder, "v2")
    assert late.stage == "after" and {f.rule for f in late.findings} == {"gain", "regression"}
    events = (run / "lineage.jsonl").read_text()
    cut = [line for line in events.splitlines(True) if '"name":"v2"' not in line]
    (run / "lineage.jsonl").write_text("".join(cut))  # as while v2 was under way
    during = run_health(folder, "v2")
    assert during.stage == "during" and {f.rule for f in during.findings} == {"payback", "complete"}
    (run / "lineage.jsonl").write_text(events)


def test_exit_codes_and_the_alarm(run: Path, tmp_path: Path) -> None:
    def health_of(limit: str, *more: object) -> tuple[int, str, str]:
        text = (run / "config.yaml").read_text()
        start = text.index("health:")
        heard = tmp_path / "heard.json"
        script = f"import pathlib, sys; pathlib.Path({str(heard)!r}).write_text(sys.stdin.read())"
        (tmp_path / "alarm.py").write_text(script)
        alarm = f"  command: {sys.executable} {tmp_path / 'alarm.py'}\n"
        (run / "config.yaml").write_text(text[:start] + f"health:\n  regression: {limit}\n{alarm}")
        heard.unlink(missing_ok=True)
        done = velopath("health", run, "v1", *more)
        (run / "config.yaml").write_text(text)
        return done.code, done.out, heard.read_text() if heard.exists() else ""

    assert health_of("[5, 9]")[::2] == (0, "")
    code, out, heard = health_of("[-5, 9]", "--json")
    assert code == 7 and json.loads(out)["verdict"] == json.loads(heard)["verdict"] == "warn"
    code, out, heard = health_of("[-9, -5]")
    assert (
        code == 6 and "v1 at step 40 (after a branch): stop" in out and json.loads(heard)["run"] == str(run)
    )
    assert health_of("[-9, -5]", "--quiet")[::2] == (6, "")
    unknown = velopath("health", run, "v9")
    assert unknown.code == 2 and "no version or branch 'v9'" in unknown.err
    assert velopath("health", tmp_path).code == 3


def test_a_plan_halts_at_a_stop(data: Path, tmp_path: Path) -> None:
    changes = {"control__controller": "static", "health": {"halt": True, "regression": [-9, -5]}}
    config = write_config(tmp_path / "run.yaml", data, **changes)
    stopped = velopath("run", config, "--run", tmp_path / "run")
    assert stopped.code == 6 and "health of v1 at step 40: stop" in stopped.err
    assert "health: stop" in stopped.out
    assert velopath("run", config, "health.halt=false", "--run", tmp_path / "run").code == 0
