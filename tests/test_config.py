"""RunConfig: every refusal with its message, overrides, anchored paths, the hash; what may change on resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from velopath.config import load_config, validate_config
from velopath.config_change import check_unchanged
from velopath.configured_plan import in_steps, main_path, slice_steps
from velopath.errors import ConfigError

MINIMAL: dict[str, Any] = {"data": {"slices": {"a": {"root": "/d/a", "steps": 100}}}}
YAML = """
title: test
data:
  slices:
    a: {root: data/a, steps: 100}
    b: {root: /elsewhere/b, steps: 200, weights: {x: 1, y: 2.5}}
  heldout: ../held
  cache: ~/cache
model: {hf: models/base}
control: {targets: targets.json}
path: {peak: 1e-3}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "configs" / "run.yaml"
    path.parent.mkdir()
    path.write_text(YAML)
    return path


def put(key: str, value: Any) -> dict[str, Any]:
    """`MINIMAL` with the dotted `key` set."""
    tree: dict[str, Any] = {"data": {"slices": {"a": dict(MINIMAL["data"]["slices"]["a"])}}}
    node = tree
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return tree


def test_defaults_are_the_documented_ones() -> None:
    config = validate_config(MINIMAL)
    assert (config.path.peak, config.path.warmup_steps, config.path.branch_share) == (3e-4, 100, 0.6)
    assert (config.train.rows, config.train.row_tokens, config.train.clip) == (8, 2048, 1.0)
    assert (config.control.controller, config.control.in_branch, config.control.every) == (
        "velocitune",
        "hold",
        50,
    )
    assert (config.proxy.steps, config.proxy.points, config.seed) == (350, 7, 0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tilte", "x", "tilte: unknown key$"),
        ("data.slices.a.stesp", 5, r"data\.slices\.a\.stesp: unknown key$"),
        ("train.row", 5, r"train\.row: unknown key$"),
        ("data.slices", {}, r"data\.slices: .*at least 1 item.*\(given: \{\}\)"),
        ("data.slices", [1], r"data\.slices: .*valid dictionary.*\(given: \[1\]\)"),
        (
            "data.slices.a",
            {"root": "/d"},
            r"data\.slices\.a: .*it has no length; give steps, or tokens such as 2e9",
        ),
        (
            "data.slices.a.tokens",
            "2e9",
            r"data\.slices\.a: .*steps 100 and tokens 2000000000 are both given; give one",
        ),
        *(
            ("data.slices.a", {"root": "/d", "tokens": value}, rf"data\.slices\.a\.tokens: .*{message}")
            for value, message in (
                (0, "greater than 0"),
                (-5, "-5 is no number of tokens; expected a whole one, such as 2e9 or 2_000_000_000"),
                (2.5, r"2\.5 is no number of tokens"),
                ("2.5", r"'2\.5' is no number of tokens"),
                ("2 billion", "'2 billion' is no number of tokens"),
                ("1e19", "'1e19' is no number of tokens"),
                ("1e999999999", "'1e999999999' is no number of tokens"),
                ("nan", "'nan' is no number of tokens"),
                (float("inf"), "inf is no number of tokens"),
                (True, "True is no number of tokens"),
                ([1], r"\[1\] is no number of tokens"),
            )
        ),
        ("path.warmup_tokens", -1, r"path\.warmup_tokens: .*-1 is no number of tokens"),
        (
            "path.warmup_steps",
            None,
            r"path: .*it has no warm-up; give warmup_steps \(0: none\), or warmup_tokens",
        ),
        (
            "path",
            {"warmup_steps": 5, "warmup_tokens": "1e6"},
            "path: .*warmup_steps 5 and warmup_tokens 1000000 are both given; give one of them",
        ),
        ("data.slices.a", {"steps": 3}, r"data\.slices\.a\.root: Field required$"),
        ("data.slices.a.steps", 0, r"data\.slices\.a\.steps: .*greater than 0 \(given: 0\)"),
        ("data.slices.a.steps", 2.5, r"data\.slices\.a\.steps: .*integer.*\(given: 2\.5\)"),
        ("data.slices.a.weights", {"x": "much"}, r"weights\.x: .*number.*\(given: 'much'\)"),
        ("data.bin_shards", 2, r"data\.bin_shards is for data\.packing best_fit"),
        (
            "data",
            {**MINIMAL["data"], "packing": "best_fit", "bin_shards": 9, "order": "windowed"},
            r"data\.bin_shards is 9, more than data\.window, 8",
        ),
        ("data.bin_shards", 0, r"data\.bin_shards: .*greater than 0"),
        ("data.exhaustion", "again", r"data\.exhaustion: .*'repeat'.*\(given: 'again'\)"),
        ("model.overrides", {"hidden_size": "big"}, r"model\.overrides\.hidden_size"),
        ("control.every", 0, r"control\.every: .*greater than 0 \(given: 0\)"),
        ("control.heldout_tokens", -1, r"control\.heldout_tokens: .*greater than 0"),
        ("control.signal", "both", r"control\.signal: .*'heldout', 'training' or 'anchored'"),
        ("control.in_branch", "rewind", r"control\.in_branch: .*'hold', 'replay' or 'live'"),
        ("control.targets", {"x": "low"}, r"control\.targets"),
        ("path.peak", 0, r"path\.peak: .*greater than 0 \(given: 0\)"),
        ("path.warmup_steps", -1, r"path\.warmup_steps: .*greater than or equal to 0 \(given: -1\)"),
        ("path.branch_share", 1.2, r"path\.branch_share: .*less than or equal to 1 \(given: 1\.2\)"),
        ("path.shape", "step", r"path\.shape: .*'cosine'.*\(given: 'step'\)"),
        ("data.slices.a.shape", "step", r"data\.slices\.a\.shape: .*'cosine'.*\(given: 'step'\)"),
        ("data.slices.a.branch_share", 0, r"data\.slices\.a\.branch_share: .*greater than 0 \(given: 0\)"),
        ("data.slices.a.branch_share", 1.1, r"branch_share: .*less than or equal to 1 \(given: 1\.1\)"),
        ("data.slices.a.branch_share", "most", r"branch_share: .*valid number.*\(given: 'most'\)"),
        ("path.floor", -1e-5, r"path\.floor: .*greater than or equal to 0"),
        ("train.rows", 0, r"train\.rows: .*greater than 0"),
        ("train.betas", [0.9], r"train\.betas"),
        ("train.clip", -1, r"train\.clip: .*greater than or equal to 0"),
        ("train.precision", "fp16", r"train\.precision: .*'fp32' or 'bf16' \(given: 'fp16'\)"),
        ("train.device", "tpu", r"train\.device: .*'auto', 'cpu' or 'cuda' \(given: 'tpu'\)"),
        ("train.threads", -1, r"train\.threads: .*greater than or equal to 0"),
        ("train.keep_last", 0, r"train\.keep_last: .*greater than 0"),
        ("train.micro_rows", 3, r"train: .*micro_rows 3 does not divide rows 8"),
        ("proxy.points", 3, r"proxy\.points: .*greater than or equal to 4 \(given: 3\)"),
        ("proxy.first", 1.5, r"proxy\.first: .*less than or equal to 1"),
        ("proxy.first", 0, r"proxy\.first: .*greater than 0 \(given: 0\)"),
        ("path.branch_share", 0, r"path\.branch_share: .*greater than 0 \(given: 0\)"),
        ("proxy.law", "four", r"proxy\.law: .*'auto', 'two', 'three' or 'prior'"),
        ("evaluate.tokens", 0, r"evaluate\.tokens: .*greater than 0"),
        ("seed", -1, r"seed: .*seed -1 is outside 0 \.\.\. 2\^63 - 1"),
        ("seed", 1 << 63, r"seed: .*outside 0"),
        # YAML knows numbers that JSON does not: a comparison with NaN is never true.
        ("path.peak", float("nan"), r"path\.peak: .*finite"),
        ("path.peak", float("inf"), r"path\.peak: .*finite"),
        ("path.floor", float("nan"), r"path\.floor: .*finite"),
        ("train.weight_decay", float("nan"), r"train\.weight_decay: .*finite"),
        ("train.clip", float("inf"), r"train\.clip: .*finite"),
        ("control.targets", {"x": float("nan")}, r"control\.targets.*finite"),
        ("data.slices.a.weights", {"x": float("inf")}, r"weights\.x: .*finite"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?m)^here: .*{message}"):
        validate_config(put(key, value), where="here")


def test_every_wrong_key_is_named_at_once() -> None:
    tree = put("train.rows", 0) | {"extra": 1}
    with pytest.raises(ConfigError) as error:
        validate_config(tree, where="here")
    assert [line.split(":")[1].strip() for line in str(error.value).splitlines()] == ["train.rows", "extra"]


def test_relative_paths_are_the_files_not_the_callers(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    here = load_config(file)
    monkeypatch.chdir("/")
    config = load_config(file)
    assert config == here
    assert config.data.slices["a"].root == str(tmp_path / "configs" / "data" / "a")
    assert config.data.slices["b"].root == "/elsewhere/b"
    assert config.data.heldout == str(tmp_path / "held")
    assert config.data.cache == "/home/someone/cache"
    assert config.model.hf == str(tmp_path / "configs" / "models" / "base")
    assert config.control.targets == str(tmp_path / "configs" / "targets.json")


def test_overrides_are_applied_in_order(file: Path) -> None:
    config = load_config(
        file,
        [
            "train.rows=4",
            "train.rows=16",
            "path.peak=2e-3",
            "data.slices.a.steps=7",
            "control.options.floor=0.02",
            "control.targets={x: 1.5, y: 2}",
            "train.micro_rows=null",
            "title=a = b",
            "seed=9",
        ],
    )
    assert (config.train.rows, config.path.peak, config.data.slices["a"].steps) == (16, 2e-3, 7)
    assert config.control.options == {"floor": 0.02}
    assert config.control.targets == {"x": 1.5, "y": 2.0}
    assert (config.train.micro_rows, config.title, config.seed) == (None, "a = b", 9)
    assert list(config.data.slices) == ["a", "b"]


@pytest.mark.parametrize("text", ["train.rows", "=4", ""])
def test_an_override_without_a_value_is_refused(file: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=f"override {text!r} is not of the form a.b=c"):
        load_config(file, [text])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.row=4", r"run\.yaml: train\.row: unknown key"),
        ("train.rows.of=4", r"run\.yaml: train\.rows: .*\(given: \{'of': 4\}\)"),
        ("title=${nowhere}", r"run\.yaml: .*nowhere"),
        ("train.betas=[0.9", r"run\.yaml|override"),
    ],
)
def test_an_override_is_validated_like_the_file(file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(file, [override])


def test_interpolation_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "base: {steps: 5}\ndata: {slices: {a: {root: /d, steps: 5}, b: {root: /e, steps: '${seed}'}}}\nseed: 6"
    )
    with pytest.raises(ConfigError, match="base: unknown key"):
        load_config(path)
    path.write_text(path.read_text().replace("base: {steps: 5}\n", ""))
    assert load_config(path).data.slices["b"].steps == 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [1, 2", r"run\.yaml: .*expected ',' or '\]'"),
        (b"- a\n- b\n", "run.yaml: expected a map with the keys of RunConfig"),
        (b"just text", "run.yaml"),
        (b"", "run.yaml: data: Field required"),
        (b"title: \xff\xfe", "run.yaml: .*decode"),
        (b"data: " + b"[" * 60_000, "nested more than 50 levels deep"),  # the C loader would end the process
        (b"- " * 60_000, "nested more than 50 levels deep"),
        (b"title: " + b"x" * (1 << 20), "larger than 1048576 bytes"),
        (b"true", "run.yaml: Invalid loaded object type"),
        (b'data: {cache: "a\\0b"}', "cache is 'a.*expected a path"),
        (b"data: {slices: {a: 3}}", r"run\.yaml: data\.slices\.a"),
        (b"data: {slices: 3}", r"run\.yaml: data\.slices"),
        (b"data: 3", r"run\.yaml: data"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such config file: .*nope\.yaml"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="is a folder; expected a YAML file"):
        load_config(tmp_path)


def test_the_hash_is_of_the_meaning_and_stays(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    echoed = tmp_path / "elsewhere" / "config.yaml"
    echoed.parent.mkdir()
    echoed.write_text(config.to_yaml())
    assert load_config(echoed) == config
    assert load_config(echoed).hash == config.hash
    assert load_config(file, ["seed=1"]).hash != config.hash
    assert load_config(file, ["path.peak=0.001"]).hash == config.hash
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    assert config.hash == hashlib.sha256(canonical.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "text", ["2e9", "2_000_000_000", "2000000000", "'2e9'", "2.0e+9", "'2_000_000_000'", "2.0E9"]
)
def test_tokens_as_people_write_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{slices: {{a: {{root: /d, tokens: {text}}}}}}}\npath: {{warmup_tokens: {text}}}")
    config = load_config(path)
    assert (config.data.slices["a"].tokens, config.path.warmup_tokens) == (2 * 10**9, 2 * 10**9)
    assert (config.data.slices["a"].steps, config.path.warmup_steps) == (None, None)
    assert load_config(path, ["data.slices.a.tokens=3e9"]).data.slices["a"].tokens == 3 * 10**9
    other = load_config(path, ["data.slices.a.tokens=null", "data.slices.a.steps=7", "path.warmup_tokens=0"])
    assert (other.data.slices["a"].steps, other.path.warmup_tokens) == (7, 0)
    path.write_text(config.to_yaml())
    assert load_config(path) == config


def test_lengths_in_tokens_become_steps() -> None:
    slices = {
        "a": {"root": "/d", "tokens": "2e9"},
        "b": {"root": "/d", "steps": 30},
        "c": {"root": "/d", "tokens": 3},
    }
    config = validate_config({"data": {"slices": slices}, "path": {"warmup_tokens": 24576}})
    resolved = in_steps(config, 16384)
    # 2e9 / 16384 = 122070.3; 24576 / 16384 = 1.5, half up; 3 tokens are at least a step
    assert slice_steps(resolved) == {"a": 122070, "b": 30, "c": 1}
    assert main_path(resolved).warmup_steps == 2
    assert all(entry.tokens is None for entry in resolved.data.slices.values())
    assert resolved.path.warmup_tokens is None
    assert in_steps(resolved, 999) == resolved  # once: another number of tokens a step changes nothing
    assert validate_config(resolved.model_dump(mode="json")) == resolved
    none = validate_config({"data": {"slices": slices}, "path": {"warmup_tokens": 0}})
    assert main_path(in_steps(none, 16384)).warmup_steps == 0
    with pytest.raises(
        ConfigError, match=r"data\.slices\.a has a length in tokens, and nothing says how many a step"
    ):
        slice_steps(config)
    with pytest.raises(ConfigError, match=r"path\.warmup_tokens has a length in tokens"):
        main_path(config)


@pytest.mark.parametrize(
    "override",
    [
        "title=other",
        "data.cache=/c",
        "evaluate.tokens=5",
        "evaluate.batch_rows=2",
        "train.device=cpu",
        "train.compile=true",
        "train.threads=0",
        "data.on_bad_shard=quarantine",
        "train.log_every=1",
        "train.checkpoint_every=7",
        "train.keep_last=5",
        "data.slices.c={root: /d/c, steps: 9}",
    ],
)
def test_what_changes_no_result_may_change(file: Path, override: str) -> None:
    check_unchanged(load_config(file), load_config(file, [override]), file)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1", "  seed: 0 -> 1"),
        ("path.peak=1e-4", "  path.peak: 0.001 -> 0.0001"),
        ("path.shape=linear", "  path.shape: 'cosine' -> 'linear'"),
        ("train.rows=4", "  train.rows: 8 -> 4"),
        ("train.micro_rows=4", "  train.micro_rows: None -> 4"),
        ("train.precision=bf16", "  train.precision: 'fp32' -> 'bf16'"),
        ("control.options.floor=0.1", "  control.options.floor: None -> 0.1"),
        ("data.slices.a.steps=99", "  data.slices.a.steps: 100 -> 99"),
        ("data.slices.b.weights.y=2", "  data.slices.b.weights.y: 2.5 -> 2.0"),
        ("data.slices.b.branch_share=0.3", "  data.slices.b.branch_share: None -> 0.3"),
        ("data.slices.b.shape=knee", "  data.slices.b.shape: None -> 'knee'"),
        ("data.exhaustion=stop", "  data.exhaustion: 'repeat' -> 'stop'"),
        ("model.overrides.hidden_size=8", "  model.overrides.hidden_size: None -> 8"),
        ("proxy.points=5", "  proxy.points: 7 -> 5"),
    ],
)
def test_what_changes_a_result_is_refused_with_a_diff(file: Path, override: str, line: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_unchanged(load_config(file), load_config(file, [override, "title=free"]), file)
    first, *middle, last = str(error.value).splitlines()
    assert first == f"this configuration differs from the one the run was started with ({file}):"
    assert middle == [line]
    hint = "; `velopath override` changes a rate on record" if override.startswith("path.") else ""
    assert last == f"use the recorded values, or start another run folder{hint}"


def test_slices_are_only_added_behind(file: Path) -> None:
    recorded = load_config(file)
    tree = recorded.model_dump(mode="json")
    slices = tree["data"]["slices"]
    for names, message in (
        (["b", "a"], r"data\.slices: in the order \['a', 'b'\] -> \['b', 'a'\]$"),
        (["c", "a", "b"], r"data\.slices: in the order \['a', 'b'\] -> \['c', 'a', 'b'\]$"),
        (["a", "c", "b"], r"data\.slices: in the order \['a', 'b'\] -> \['a', 'c', 'b'\]$"),
        (["a"], r"data\.slices\.b: .* -> None$"),
    ):
        given = tree | {"data": tree["data"] | {"slices": {n: slices.get(n, slices["a"]) for n in names}}}
        with pytest.raises(ConfigError, match=f"(?m){message}"):
            check_unchanged(recorded, validate_config(given), file)
