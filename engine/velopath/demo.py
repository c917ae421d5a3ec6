"""The demo: the whole product on real text in a few minutes on two cores.

Corpus and tokenizer -> token shards -> a small base model that knows three domains -> main path over six domains, its
first steps at equal weights for the targets, then under Velocitune; two data slices, two versions -> exports -> report.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from velopath.config import RunConfig, validate_config
from velopath.corpus import CorpusReport, build_corpus
from velopath.errors import ConfigError
from velopath.export import export_version
from velopath.prepare import prepare
from velopath.proxy import find_targets
from velopath.report import build_summary, write_report
from velopath.report.picture import write_png
from velopath.run import Run
from velopath.sampler_speed import log_sampler_speed
from velopath.segments import cut_version, train_main

KNOWN = ("docs", "python", "verse")
"""Domains of the base model: it has never seen the others."""
SLICES = ("slice-1", "slice-2")
VOCABULARY = 1024
GUARDS = {
    "small_gap": "mean",  # a domain that the base model knows has too small a gap for a velocity of its own
    "floor": 0.05,
    "cap": 0.5,
    "smoothing": 0.2,
    "smoothing_to": "prior",
    "step_size": 0.5,
    "missing": "last",  # a domain that no batch held since the last update keeps its loss
}
"""Velocitune's options where it was held beside other rules: docs/mixing.md, "our guards, free signal"."""

Show = Callable[[Run], AbstractContextManager[None]]
Say = Callable[[str], None]


def run_demo(out: Path, *, show: Show, say: Say, fresh: bool = False, scale: float = 1.0) -> dict[str, Any]:
    """Run or resume the demo in `out`; returns the summary. `scale` shrinks all steps and evaluations (for tests).

    `show` wraps each run in its progress display, `say` prints a line per stage.
    """
    start = time.perf_counter()
    out = out.resolve()  # a configuration names its data from anywhere
    if fresh and out.exists():
        if not (out / "demo.txt").exists():
            raise ConfigError(f"{out} is not a demo's folder; --fresh deletes only those")
        shutil.rmtree(out)
    if out.is_dir() and any(out.iterdir()) and not (out / "demo.txt").exists():
        raise ConfigError(f"{out} holds something else; give --out a new folder")
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.txt").write_text("Made by `velopath demo`; safe to delete.\n")

    if all((out / "data" / name / "domains.json").exists() for name in SLICES):
        say("corpus and token shards are there already")
    else:
        _make_data(out, say)

    say(f"base model: {', '.join(KNOWN)} only, ends decayed, hands on no optimiser state")
    base = _train_base(out, scale, show)
    run_config = demo_config(out, base, scale)
    with Run.open(run_config, out, command="velopath demo") as run, show(run):
        run.seconds_before = time.perf_counter() - start
        say("targets: first steps of the main path at equal weights, one law per domain")
        find_targets(run)
        say("main path under Velocitune, a branch for each version")
        for segment in run.plan.segments:
            if segment.kind == "main":
                train_main(run, segment.end_step)
            else:
                cut_version(run, segment.name)
                export_version(run, segment.name)
        log_sampler_speed(run)
    say(f"report: {write_report(out)}")
    write_png(out, out / "report.png")
    return build_summary(out)


def _make_data(out: Path, say: Say) -> None:
    say("corpus: real text from pinned packages")
    corpus = build_corpus(out / "corpus")
    for warning in corpus.warnings:
        say(f"  warning: {warning}")
    sizes = ", ".join(f"{name} {d.bytes / 1e6:.1f} MB" for name, d in corpus.domains.items())
    say(f"  {sizes}")
    say("prepare: tokenizer and token shards")
    _prepare(corpus, out)


def _prepare(corpus: CorpusReport, out: Path) -> None:
    """Both slices with one tokenizer, trained on the first."""
    tokenizer: str | Path = f"train:{VOCABULARY}"
    for name in SLICES:
        folder = out / "data" / name
        prepare(
            {domain: corpus.file(name, domain) for domain in corpus.domains},
            folder,
            tokenizer=tokenizer,
            licences={n: d.licence for n, d in corpus.domains.items()},
            sources={n: d.source for n, d in corpus.domains.items()},
        )
        tokenizer = folder / "tokenizer.json"


def _train_base(out: Path, scale: float, show: Show) -> Path:
    """A base model as one gets it from elsewhere: a decayed Hugging Face checkpoint of some domains."""
    folder = out / "base"
    weights = {name: 1.0 if name in KNOWN else 0.0 for name in _domains(out)}
    config = _config(
        "demo base model",
        slices={
            "base": {"root": str(out / "data" / SLICES[0]), "steps": _steps(500, scale), "weights": weights}
        },
        scale=scale,
        control={"controller": "static", "heldout_tokens": _tokens(4096, scale)},
    )
    with Run.open(config, folder, command="velopath demo") as run, show(run):
        train_main(run)
        cut_version(run, "v1")
        return export_version(run, "v1")


def _domains(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "data" / SLICES[0] / "train").iterdir())


def demo_config(out: Path, base: Path, scale: float = 1.0) -> RunConfig:
    """The demo's configuration: 0.16M parameters, 1,024 tokens a step, T = 700, alpha 0.6."""
    steps = _steps(700, scale)
    equal = dict.fromkeys(_domains(out), 1.0)
    return _config(
        "velopath demo",
        slices={
            name: {"root": str(out / "data" / name), "steps": steps, "weights": equal} for name in SLICES
        },
        scale=scale,
        control={
            "controller": "velocitune",
            "options": GUARDS,
            "signal": "training",
            "every": _steps(50, scale),
            "heldout_tokens": _tokens(4096, scale),
        },
        model={"hf": str(base)},
        proxy={"source": "main", "steps": max(_steps(105, scale), 13), "points": 7, "first": 0.15},
    )


def _config(
    title: str,
    *,
    slices: dict[str, Any],
    scale: float,
    control: dict[str, Any],
    model: dict[str, Any] | None = None,
    proxy: dict[str, Any] | None = None,
) -> RunConfig:
    return validate_config(
        {
            "title": title,
            "seed": 1,
            "data": {"slices": slices},
            "model": model or {"preset": "tiny"},
            "control": control,
            "path": {"peak": 3e-3, "warmup_steps": _steps(30, scale), "branch_share": 0.6, "shape": "cosine"},
            "train": {
                "rows": 4,
                "row_tokens": 256,
                "log_every": 10,
                "checkpoint_every": _steps(200, scale),
                "device": "cpu",
                # A second thread gains a quarter on an idle machine and loses nearly all on a busy one, because
                # kernels this small spend their time waiting for each other.
                "cpu_threads": 1,
            },
            "proxy": proxy or {},
            "evaluate": {"tokens": _tokens(16384, scale)},
        },
        where="demo",
    )


def _steps(steps: int, scale: float) -> int:
    return max(round(steps * scale), 4)


def _tokens(tokens: int, scale: float) -> int:
    return max(round(tokens * scale), 512)
