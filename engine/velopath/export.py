"""Models out of a run: a version or main checkpoint as a Hugging Face folder, and its held-out losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from velopath.cache import local_copy
from velopath.checkpoint import load_checkpoint, step_folder
from velopath.domains import DomainLoss
from velopath.errors import ConfigError
from velopath.evaluate import evaluate
from velopath.hf import load_hf, save_hf
from velopath.lineage import Cost
from velopath.model import Decoder
from velopath.model_card import model_card
from velopath.run import MAIN, Run
from velopath.runlineage import ORIGIN, read_lineage, record_export
from velopath.urls import below


def export_version(run: Run, name: str, out: Path | None = None) -> Path:
    """Write version `name` (or "main@STEP") as a Hugging Face Llama folder; returns it.

    Weights as safetensors in fp32, config, tokenizer, a model card and `velopath.json`. Default place
    RUN/exports/NAME. An earlier export there is replaced, any other content refused (`ConfigError`).
    """
    folder = out if out is not None else run.folder.path / "exports" / name.replace("@", "-")
    if folder.exists() and not (folder / ORIGIN).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an export (no {ORIGIN}); choose another folder")
    checkpoint = load_checkpoint(checkpoint_folder(run, name))
    decoder = run.new_model()
    checkpoint.restore(decoder)
    root = run.data_root
    tokenizer = local_copy(below(root, "tokenizer.json"), run.config.data.cache)
    lineage = read_lineage(run.folder)
    version = next((v for v in lineage.versions if v.name == name), None)
    if run.dist.is_main:
        save_hf(
            folder,
            decoder,
            tokenizer_file=tokenizer,
            eos=run.prepared.get("eos"),
            model_card=model_card(run, name, version),
            extra={ORIGIN: _origin(run, name, checkpoint.state)},
        )
        if version is not None:
            record_export(run.folder, name, folder)
    run.dist.barrier()
    return folder


def evaluate_model(run: Run, model: str, tokens: int | None = None) -> DomainLoss:
    """Held-out loss per domain of a version, "main@STEP" or a Hugging Face folder, with standard errors.

    On the run's held-out set; `tokens` per domain, default the config's `evaluate.tokens`.
    """
    decoder: Decoder
    if model not in checkpoint_folders(run) and Path(model).is_dir():
        _, decoder = load_hf(model, device=run.dist.device)
    else:
        decoder = run.new_model()
        load_checkpoint(checkpoint_folder(run, model)).restore(decoder)
    settings = run.config.evaluate
    return evaluate(
        decoder,
        run.held_out(run.domain_names),
        tokens_per_domain=settings.tokens if tokens is None else tokens,
        batch_rows=settings.batch_rows,
        dist=run.dist,
        bf16=run.config.train.precision == "bf16",
        document_mask=run.config.train.document_mask,
    )


def checkpoint_folder(run: Run, name: str) -> Path:
    """The checkpoint behind a version's name or "main@STEP". Raises `ConfigError` naming what there is."""
    known = checkpoint_folders(run)
    if name not in known:
        raise ConfigError(
            f"no model {name!r} in {run.folder.path}; there are {', '.join(known) or 'none yet'}"
        )
    return known[name]


def checkpoint_folders(run: Run) -> dict[str, Path]:
    """Name -> checkpoint of every version and of every kept main checkpoint ("main@STEP")."""
    versions = read_lineage(run.folder).versions
    found = {v.name: step_folder(run.checkpoints(v.name), v.branch_step + v.steps) for v in versions}
    main = {f"{MAIN}@{step}": step_folder(run.checkpoints(MAIN), step) for step in run.kept_main_steps()}
    return found | main


def _origin(run: Run, name: str, state: dict[str, Any]) -> dict[str, Any]:
    """What made the model: `step` is this run's; steps and tokens count from random weights where all of it is ours."""
    sampler = state["session"]["sampler"]
    base = sum((cost for what, cost in read_lineage(run.folder).spent if what == "base"), Cost())
    return {
        "title": run.config.title,
        "model": name,
        "step": state["step"],
        "steps": base.base_steps + state["step"],
        "tokens": base.tokens + state["step"] * sampler["rows"] * sampler["world"] * sampler["row_tokens"],
        "config_hash": run.config.hash,
    }
