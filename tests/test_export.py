"""Exported versions: loaded by transformers with our loss, continued by another run, described by their card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from small_corpus import make_codec, make_corpus
from small_run import config, in_force
from velopath.checkpoint import step_folder
from velopath.errors import ConfigError
from velopath.evaluate import HeldOut
from velopath.export import evaluate_model, export_version
from velopath.prepare import prepare
from velopath.report import build_summary
from velopath.run import Run
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage
from velopath.segments import cut_version, train_main
from velopath.verification import verify_run

SLICES = {"one": {"steps": 20}, "two": {"steps": 10}}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real prepared text of two domains with a tokenizer of 400 entries."""
    root = tmp_path_factory.mktemp("text")
    prepare(
        make_corpus(root),
        root / "data",
        tokenizer=make_codec(root),
        heldout_percent=10,
        licences={"a": "MIT", "b": "CC0-1.0"},
        sources={"a": "words 1.0"},
    )
    return root / "data"


def settings(text: Path, **changes: object) -> object:
    slices = {name: {**entry, "root": str(text)} for name, entry in SLICES.items()}
    return config(text, **{"data__slices": slices, "control__targets": {"a": 1.0, "b": 1.0}, **changes})


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both versions exported."""
    folder = tmp_path_factory.mktemp("finished")
    with Run.open(settings(text), folder, command="test") as run:  # type: ignore[arg-type]
        train_main(run)
        for name in ("v1", "v2"):
            cut_version(run, name)
            export_version(run, name)
    return folder


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_transformers_finds_the_same_held_out_loss(finished: Path, text: Path, name: str) -> None:
    folder = finished / "exports" / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = "the cat sat\non the mat"
    assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert len(tokenizer) == 400 and tokenizer.eos_token_id == 0
    recorded = read_lineage(RunFolder(finished)).find(name).heldout_loss
    sample = HeldOut.open(text, row_tokens=32, seed=0).sample(400)
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.inputs.astype(np.int64))).logits
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.from_numpy(sample.targets).flatten(), ignore_index=-100, reduction="none"
    ).view(sample.targets.shape)
    for k, domain in enumerate(("a", "b")):
        mine = sample.domains == k
        theirs = nats[mine].sum() / (sample.targets[mine] != -100).sum()
        assert recorded[domain] == pytest.approx(float(theirs), abs=1e-4)
        assert recorded[domain] < np.log(400) - 0.5  # it has learnt something


def test_the_weights_are_the_checkpoints(finished: Path) -> None:
    for name, segment, step in (("v1", "v1", 20), ("v2", "v2", 30)):
        exported = load_file(finished / "exports" / name / "model.safetensors")
        saved = load_file(step_folder(finished / "checkpoints" / segment, step) / "model.safetensors")
        assert set(exported) == set(saved)
        assert all(torch.equal(exported[k], saved[k]) for k in saved)


def test_models_are_evaluated_by_name_and_by_folder(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "elsewhere" / "v1").mkdir(parents=True, exist_ok=True)
    (finished / "checkpoints" / "main" / "step-00000008.replaced").mkdir(
        exist_ok=True
    )  # as a killed save may
    monkeypatch.chdir(finished / "elsewhere")  # a version's name goes before a folder of that name
    with Run.reopen(finished, command="test", mode="read") as run:
        recorded = read_lineage(run.folder).find("v1").heldout_loss
        assert dict(evaluate_model(run, "v1")) == recorded
        assert dict(evaluate_model(run, str(finished / "exports" / "v1"))) == recorded
        assert dict(evaluate_model(run, "main@8")) == read_lineage(run.folder).find("v1").notes["before"]
        assert evaluate_model(run, "v1", tokens=64).tokens == (64, 64)
        train = run.config.train.model_copy(update={"document_mask": True})  # judged as it was trained
        run.config = run.config.model_copy(update={"train": train})
        assert dict(evaluate_model(run, "v1")) != recorded
        for unknown in ("v3", "main@9", "main@", "main"):
            message = f"no model {unknown!r} in .*; there are v1, v2, main@8, main@"
            with pytest.raises(ConfigError, match=message):
                evaluate_model(run, unknown)


def test_the_lineage_knows_where_a_version_went(finished: Path, tmp_path: Path) -> None:
    with Run.reopen(finished, command="test", mode="append") as run:
        assert read_lineage(run.folder).find("v1").export == "exports/v1"
        main = export_version(run, "main@8", tmp_path / "trunk")
        assert AutoModelForCausalLM.from_pretrained(main).config.vocab_size == 400
    assert [v["export"] for v in build_summary(finished)["versions"]] == ["exports/v1", "exports/v2"]
    events = len(RunFolder(finished).events())
    with Run.reopen(finished, command="test", mode="append") as run:
        export_version(run, "v1")  # replaces the earlier one
    assert len(RunFolder(finished).events()) == events


def test_only_an_earlier_export_is_replaced(finished: Path, tmp_path: Path) -> None:
    precious = tmp_path / "thesis" / "chapter.tex"
    precious.parent.mkdir()
    precious.write_text("years of work")
    with Run.reopen(finished, command="test", mode="append") as run:
        with pytest.raises(ConfigError, match=r"thesis exists and is not an export \(no velopath.json\)"):
            export_version(run, "v1", precious.parent)
        assert precious.read_text() == "years of work"
        (tmp_path / "empty").mkdir()
        for _ in range(2):
            export_version(run, "main@8", tmp_path / "empty")


def test_what_made_a_version_lies_beside_it(finished: Path) -> None:
    origin = json.loads((finished / "exports" / "v2" / "velopath.json").read_text())
    with Run.reopen(finished, command="test", mode="read") as run:
        assert origin == {
            "title": "small",
            "model": "v2",
            "step": 30,
            "steps": 30,
            "tokens": 30 * 128,
            "config_hash": run.config.hash,
        }


def test_a_run_continues_from_an_export_and_knows_its_cost(
    finished: Path, text: Path, tmp_path: Path
) -> None:
    second, third = tmp_path / "second", tmp_path / "third"
    for folder, base in ((second, finished / "exports" / "v1"), (third, second / "exports" / "v1")):
        with Run.open(settings(text, model={"hf": str(base)}), folder, command="test") as run:  # type: ignore[arg-type]
            train_main(run, 8)
            cut_version(run, "v1")
            export_version(run, "v1")
    start = in_force(second, "eval", "main")[0]
    assert start["step"] == 0
    v1 = read_lineage(RunFolder(finished)).find("v1").heldout_loss
    for domain, loss in start["loss"].items():
        assert loss == pytest.approx(v1[domain], abs=0.3)  # another sample, the same model
    assert [(what, c.base_steps, c.tokens) for what, c in read_lineage(RunFolder(second)).spent] == [
        ("base", 20, 20 * 128)
    ]
    cost = build_summary(second)["cost"]
    assert (cost["base_steps"], cost["main_steps"], cost["branch_steps"]) == (20, 8, 12)
    assert [f.error for f in verify_run(third) if f.kind == "export"] == [
        None
    ]  # by its own steps, not its base's
    # The cost of a base adds up over generations.
    assert read_lineage(RunFolder(third)).cost.base_steps == 40
    assert read_lineage(RunFolder(third)).spent[0][1].tokens == 40 * 128


def test_the_model_card_has_the_runs_numbers(finished: Path) -> None:
    card = (finished / "exports" / "v2" / "README.md").read_text()
    version = read_lineage(RunFolder(finished)).find("v2")
    assert f"- trained for it alone: {6 * 128:,} tokens in {version.seconds:,.0f} s" in card
    assert f"- trained in its history, in this run: {30 * 128:,} tokens" in card
    assert f"- hash of its slice's data: {version.notes['data']}" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# small: v2" in card and "`velocitune` controller" in card
    assert "cosine decay from 0.01 at step 24 to 0 at step 30" in card
    for domain, loss in version.heldout_loss.items():
        assert f"| {domain} | {loss:.4f} |" in card
    read = re.findall(r"^\| [ab] \| ([\d,]+) \| (\d+\.\d\d) \|$", card, re.MULTILINE)
    assert sum(int(tokens.replace(",", "")) for tokens, _ in read) == 30 * 128  # slice one whole, and its own
    assert "- parent: main@24 at step 24" in card and "- steps of the branch: 6" in card
    assert "| a | words 1.0 | MIT |" in card and "| b | - | CC0-1.0 |" in card
    assert "preset tiny, random weights, seed 0" in card
