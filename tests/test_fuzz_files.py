"""R13 in Python: whatever stands in a file that is read, a `VelopathError` comes out, never another exception.

`VELOPATH_FUZZ_EXAMPLES=5000` in the environment is the long form, over an hour; 30 examples of each are the short.
The C++ core has a fuzz target of its own, see `make sanitize`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sampler_reference import write_domain
from small_run import config, write_config
from test_sampler_state import WEIGHTS
from velopath import open_sampler
from velopath.audit import AuditLog, weights_log
from velopath.checkpoint import load_checkpoint, step_folder
from velopath.cli.explain import explained
from velopath.config import load_config
from velopath.control import check_controllers
from velopath.errors import VelopathError
from velopath.inspection import inspect_data
from velopath.lineage import Cost
from velopath.mds import load_index, read_documents
from velopath.optim import build_optimizer
from velopath.replay import steps
from velopath.report import write_report
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.runhealth import run_forecast, run_health
from velopath.runlineage import origin_cost, read_lineage, record_cost
from velopath.segments import cut_version, train_main
from velopath.session import Session
from velopath.targets import Targets
from velopath.verification import verify_run

EXAMPLES = int(os.environ.get("VELOPATH_FUZZ_EXAMPLES", "30"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63, 2**64, 10**40, 0.5, 1e308, float("nan"), float("inf")]),
    st.integers(),
    st.text(max_size=12),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "0" * 64, "inf", "1_0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=6), v, max_size=3),
    max_leaves=6,
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from places(tree[key])


@st.composite
def changed(draw: st.DrawFn, sound: Any) -> Any:
    """A JSON value with one to three places replaced, removed or added to."""
    tree = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(tree))
        if not known:
            return draw(VALUES)
        container, key = known[draw(st.integers(0, len(known) - 1))]
        match draw(st.sampled_from(["replace", "replace", "remove", "add"])):
            case "replace":
                container[key] = draw(VALUES)
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.text(max_size=6))] = draw(VALUES)
    return draw(VALUES) if draw(st.integers(0, 30)) == 0 else tree


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Bytes flipped, cut, doubled, put in or nested deeply."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "double", "insert", "deep"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 200))]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 200))]
            case "insert":
                data[at:at] = draw(st.binary(max_size=12))
            case "deep":
                data[at:at] = draw(
                    st.sampled_from([b"[" * 20_000, b'{"a":' * 20_000, b"9" * 6_000, b"\xff\xfe"])
                )
    return bytes(data)


def only_ours(read: Callable[[], object]) -> None:
    with suppress(VelopathError):
        read()


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode(errors="replace")


# ---- what is read


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with a version, to be copied."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    with Run.open(config(data, train__checkpoint_every=20), folder, command="test") as job:
        train_main(job, 20)
        cut_version(job, "v1")
        record_cost(job.folder, "base", Cost(base_steps=3, tokens=100))
    return folder


@given(value=st.data())
@fuzzed
def test_the_config(value: st.DataObject, data: Path, tmp_path: Path) -> None:
    sound = yaml.safe_load(write_config(tmp_path / "run.yaml", data).read_text())
    tree = value.draw(changed(sound) | st.just(None))
    content = yaml.safe_dump(sound).encode() if tree is None else text_of(tree)
    if tree is None:
        content = value.draw(damaged(content))
    (tmp_path / "fuzzed.yaml").write_bytes(content)
    only_ours(lambda: load_config(tmp_path / "fuzzed.yaml"))


@given(value=st.data(), key=st.text(max_size=20), given_value=st.text(max_size=20))
@fuzzed
def test_overrides(value: st.DataObject, key: str, given_value: str, data: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", data)
    key = (
        value.draw(st.sampled_from(["path.peak", "data.slices.one", "train", "control.options", "title"]))
        + key
    )
    only_ours(lambda: load_config(path, [f"{key}={given_value}"]))


@given(value=st.data())
@fuzzed
def test_the_index(value: st.DataObject, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    if not folder.exists():
        write_domain(folder, [9, 30, 5], seed=1)
        shutil.copy(folder / "index.json", tmp_path / "sound.json")
    sound = (tmp_path / "sound.json").read_bytes()
    content = value.draw(changed(json.loads(sound)).map(text_of) | damaged(sound))
    (folder / "index.json").write_bytes(content)
    only_ours(lambda: load_index(folder))
    only_ours(lambda: list(read_documents(folder)))
    with (
        suppress(VelopathError),
        open_sampler({"a": folder}, rows=1, row_tokens=4, cache=tmp_path / "c") as sampler,
    ):
        next(sampler)
    assert {p.name for p in tmp_path.iterdir()} <= {"d", "sound.json", "c"}


@given(value=st.data())
@fuzzed
def test_the_table_of_domains(value: st.DataObject, data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "data"
    if not copied.exists():
        shutil.copytree(data, copied)
    sound = (data / "domains.json").read_bytes()
    content = value.draw(changed(json.loads(sound)).map(text_of) | damaged(sound))
    (copied / "domains.json").write_bytes(content)
    with suppress(VelopathError), open_sampler(copied, rows=1, row_tokens=4, cache=tmp_path / "c") as sampler:
        next(sampler)
    only_ours(lambda: inspect_data(copied, samples=1))
    chosen = config(copied, control__targets=None)

    def start() -> None:
        with Run.open(chosen, tmp_path / "run", command="test") as job:
            job.new_model()
            job.held_out(("code",))
            check_controllers(job, 3)

    only_ours(start)


@given(value=st.data())
@fuzzed
def test_the_audit_log(value: st.DataObject, tmp_path: Path) -> None:
    """Bytes, and records with other values whose chain of hashes is made to fit again."""
    root, log = tmp_path / "d", tmp_path / "sound.jsonl"
    if not root.exists():
        for name in WEIGHTS:
            write_domain(root / name, [40, 50], seed=1)
        with open_sampler(
            root, rows=2, row_tokens=8, audit=log, cache=tmp_path / "c", weights=WEIGHTS
        ) as sampler:
            next(sampler)
            sampler.push(WEIGHTS)
            state = sampler.state_dict()
            next(sampler)
            sampler.load_state_dict(state)
            sampler.push(WEIGHTS, at_step=9)
    content = value.draw(damaged(log.read_bytes()) | st.just(b""))
    if not content:
        records = value.draw(changed([json.loads(line) for line in log.read_text().splitlines()]))
        previous, content = "0" * 64, b""
        for record in records if isinstance(records, list) else [records]:
            if isinstance(record, dict):
                record = {k: v for k, v in record.items() if k != "hash"} | {"previous": previous}
                with suppress(ValueError):
                    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
                    record["hash"] = previous = hashlib.sha256(text.encode(errors="replace")).hexdigest()
            content += (
                json.dumps(record, sort_keys=True, separators=(",", ":")).encode(errors="replace") + b"\n"
            )
    path = tmp_path / "fuzzed.jsonl"
    path.write_bytes(content)

    def replayed() -> None:
        found = weights_log(path)
        if found.order.global_rows <= 64:
            for _ in steps(found, min(found.order.start_step + 5, 1 << 62)):
                pass

    only_ours(replayed)
    only_ours(lambda: AuditLog(path).close())


@given(value=st.data())
@fuzzed
def test_a_samplers_state(value: st.DataObject, tmp_path: Path) -> None:
    root = tmp_path / "d"
    if not root.exists():
        for name in WEIGHTS:
            write_domain(root / name, [40, 50], seed=1)
    with open_sampler(
        root, rows=2, row_tokens=8, cache=tmp_path / "c", weights=WEIGHTS, threads=0
    ) as sampler:
        next(sampler)
        sampler.push(WEIGHTS, at_step=4)
        state = value.draw(changed(sampler.state_dict()))
        only_ours(lambda: sampler.load_state_dict(state))
        next(sampler)


FILES = ["metrics.jsonl", "lineage.jsonl", "run.json", "plan.json", "data.json", "config.yaml"]


@pytest.mark.parametrize("name", FILES)
@given(value=st.data())
@settings(fuzzed, max_examples=max(12, EXAMPLES // 3))
def test_the_run_folder(name: str, value: st.DataObject, run: Path, tmp_path: Path) -> None:
    """Read by `verify`, by the lineage and metrics, by opening the run."""
    copied = tmp_path / "run"
    if not copied.exists():
        shutil.copytree(run, copied)
    sound = (run / name).read_bytes()
    tree: Any = [json.loads(x) for x in sound.splitlines()] if name.endswith("l") and "json" in name else None
    if name.endswith(".json"):
        tree = json.loads(sound)
    content = value.draw(damaged(sound) if tree is None else changed(tree).map(text_of) | damaged(sound))
    if name.endswith(".jsonl") and content[:1] == b"[":
        with suppress(ValueError, RecursionError):
            content = b"".join(json.dumps(x).encode(errors="replace") + b"\n" for x in json.loads(content))
    (copied / name).write_bytes(content)
    only_ours(lambda: list(verify_run(copied)))
    only_ours(lambda: read_lineage(RunFolder(copied)))
    only_ours(lambda: RunFolder(copied).metrics())
    only_ours(lambda: write_report(copied))
    only_ours(lambda: run_health(RunFolder(copied)))
    only_ours(lambda: run_health(RunFolder(copied), "v1"))
    only_ours(lambda: run_forecast(RunFolder(copied)))
    only_ours(lambda: explained(RunFolder(copied), None))

    def reopened() -> None:
        with Run.reopen(copied, "test", "read") as job:
            job.kept_main_steps()
            job.held_out(job.domain_names)

    only_ours(reopened)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "optimizer.json"])
@given(value=st.data())
@settings(fuzzed, max_examples=max(12, EXAMPLES // 3))
def test_a_checkpoint(name: str, value: st.DataObject, run: Path, data: Path, tmp_path: Path) -> None:
    """Its JSON, with hashes that fit: restored, and given to a session."""
    copied = tmp_path / "run"
    if not copied.exists():
        shutil.copytree(run, copied)
    at = step_folder(copied / "checkpoints" / "main", 20)
    source = step_folder(run / "checkpoints" / "main", 20)
    sound = (source / name).read_bytes()
    content = value.draw(changed(json.loads(sound)).map(text_of) | damaged(sound))
    (at / name).write_bytes(content)
    if name != "manifest.json":
        manifest = json.loads((source / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (at / "manifest.json").write_text(json.dumps(manifest))

    def resumed() -> None:
        checkpoint = load_checkpoint(at)
        with Run.reopen(copied, "test", "read") as job:
            model = job.new_model()
            checkpoint.restore(model, build_optimizer(model, weight_decay=0.1), rng=True)
            (piece,) = job.pieces(20, 21)
            with job.session(piece, segment="main", path=job.main_path(), state=checkpoint.state) as session:
                assert isinstance(session, Session)

    only_ours(resumed)


@given(value=st.data())
@fuzzed
def test_targets_and_origins(value: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "velopath.json"
    origin = {"steps": 5, "tokens": 7}
    path.write_bytes(value.draw(changed(origin).map(text_of) | damaged(text_of(origin))))
    only_ours(lambda: origin_cost(tmp_path))
    sound = Targets.given({"a": 1.0, "b": 2.0}).to_json()
    tree = value.draw(changed(sound))
    if isinstance(tree, dict):
        only_ours(lambda: Targets.from_json(tree))
