"""Triton kernels without a GPU: numbers under the interpreter, and what the compiler makes of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from ahead_of_time import TARGETS, Compiled, compile_for
from loss_option_cases import OPTIONS

PINNED = "3.7.1"
"""The Triton whose registers and instructions are asserted; others only have to compile."""
INTERPRETED = [
    "domain ids per token",
    "domain ids per row",
    "int32 ids",
    "one domain",
    "130 domains",
    "empty domains",
    "all ignored",
    "one row",
    "one column",
    "logits of 1e4",
    "odd vocabulary",
    "several blocks",
    "row read twice",
    "all ignored, row read twice",
    "domain ids per token, bf16",
    "domain ids per token, fp16",
    "row read twice, bf16",
    "row read twice, fp16",
    *OPTIONS,
    "options 0222, row read twice",
    "options 1120, row read twice",
    "options 2210, row read twice",
    "linear",
    "shards",
    "invalid_ids_give_nan",
    "nan_logit",
    "padding_belongs_to_the_caller",
    "scaling",
]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    """The interpreter is chosen when triton is imported, so it gets a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", Path(__file__).with_name("interpreted_kernels.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert sorted(results) == sorted(INTERPRETED)
    return results


@pytest.mark.parametrize("name", INTERPRETED)
def test_triton_matches_fp64_under_the_interpreter(interpreted, name):
    assert interpreted[name] == []


compiled_only = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter nothing is compiled"
)
ROW = {
    "TARGETS": "*i64",
    "NATS": "*fp32",
    "COUNTED": "*i64",
    "stride_row": "i32",
    "n_cols": "i32",
    "n_load": "i32",
    "ignore_index": "i32",
}


VARIANTS = {
    "weights": {},
    "z-loss": {"Z_LOSS": 1e-4},
    "scale": {"LOGIT_SCALE": 0.5},
    "accuracy": {"CORRECT": "*fp32"},
    "smoothing": {"SMOOTHING": 0.1},
    "softcap": {"SOFTCAP": 30.0},
    "all": {"CORRECT": "*fp32", "Z_LOSS": 1e-4, "SMOOTHING": 0.1, "LOGIT_SCALE": 0.5, "SOFTCAP": 30.0},
}
"""What each option adds to weights, nats and logsumexp per row."""
DETAILS = dict.fromkeys(("SCALES", "LSE", "LOSSES"), "*fp32")
PLAIN = dict.fromkeys((*DETAILS, "CORRECT")) | {
    "LOGIT_SCALE": 1.0,
    "SOFTCAP": 0.0,
    "SMOOTHING": 0.0,
    "Z_LOSS": 0.0,
}


def row_kernel(
    target: str, dtype: str, vocab: int, folder: Path, *, aligned: bool = True, variant: str | None = None
) -> Compiled:
    from velopath.kernels.rows import cross_entropy_rows, row_config

    crowded = bool({"CORRECT", "SMOOTHING", "SOFTCAP"} & VARIANTS.get(variant or "", {}).keys())
    config = row_config(vocab, 4 if dtype == "fp32" else 2, TARGETS[target].warp_size, crowded=crowded)
    warps = config.pop("num_warps")
    asked = {} if variant is None else DETAILS | VARIANTS[variant]
    pointers = {n: kind for n, kind in asked.items() if isinstance(kind, str)}
    constants = {n: value for n, value in (PLAIN | asked).items() if n not in pointers}
    divisible = ("LOGITS", "TARGETS", "NATS", "COUNTED", *pointers)
    divisible += ("stride_row", "n_load") if aligned else ()
    return compile_for(
        target,
        cross_entropy_rows,
        {"LOGITS": f"*{dtype}", **ROW, **pointers},
        {"HAS_GRADIENT": True, **config, **constants},
        num_warps=warps,
        aligned=divisible,
        folder=folder,
    )


@compiled_only
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("dtype", "vocab"), [("bf16", 2048), ("bf16", 32000), ("bf16", 128256), ("fp32", 16000), ("fp32", 32000)]
)
def test_row_kernel_compiles_without_spills_in_wide_accesses(target, dtype, vocab, tmp_path):
    kernel = row_kernel(target, dtype, vocab, tmp_path)
    assert kernel.atomics() == []
    if triton.__version__ == PINNED:
        assert kernel.local_bytes == 0
        wide = [i for i in kernel.loads() + kernel.stores() if i.endswith(".v4.b32")]
        narrow = [i for i in kernel.loads() + kernel.stores() if not i.endswith(".v4.b32")]
        # Narrow are the scalars: target, its logit, the count; twice nats (an ignored row has its own store).
        assert wide and len(narrow) == 5
        # Five barriers, of the row's two reductions: none inside a loop over columns.
        assert kernel.assembly.count("bar.sync") == 5


INSTRUCTIONS = {
    ("sm_80", 32000): 1346,
    ("sm_80", 128256): 417,
    ("sm_90", 32000): 1346,
    ("sm_90", 128256): 417,
    ("sm_100", 32000): 1307,
    ("sm_100", 128256): 388,
}
"""Lines of PTX of the bf16 kernel before it knew any option: those not asked for cost nothing."""


@compiled_only
@pytest.mark.parametrize(("target", "vocab"), INSTRUCTIONS)
def test_options_that_are_off_leave_no_instruction(target, vocab, tmp_path):
    kernel = row_kernel(target, "bf16", vocab, tmp_path)
    if triton.__version__ == PINNED:
        text = re.sub(r"(?m)^\s*(//|;|\.loc|\.file).*$", "", kernel.assembly)
        assert len(re.findall(r"(?m)^\s+(@?%?[\w.]+)", text)) == INSTRUCTIONS[target, vocab]


@compiled_only
@pytest.mark.parametrize("vocab", [8000, 32000, 128256])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_options_add_no_access_to_the_logits(target, vocab, tmp_path):
    plain = row_kernel(target, "bf16", vocab, tmp_path)
    for variant in VARIANTS if target == "sm_90" else ("z-loss", "all"):
        if vocab == 32000 and variant not in ("weights", "z-loss", "scale"):
            plain = row_kernel(target, "bf16", 128256, tmp_path)  # read twice already at this length
        kernel = row_kernel(target, "bf16", vocab, tmp_path, variant=variant)
        assert kernel.atomics() == []
        if triton.__version__ != PINNED:
            continue
        if target == "gfx942":
            # Spilt scalar registers stay in lanes of vector registers; those must not go to memory.
            assert set(re.findall(r"vgpr_spill_count: +(\d+)", kernel.assembly)) == {"0"}
            continue
        assert kernel.local_bytes == 0, variant

        def wide(accesses: list[str]) -> int:
            return sum(access.endswith(".v4.b32") for access in accesses)

        assert wide(kernel.loads()) == wide(plain.loads()) and wide(kernel.stores()) == wide(plain.stores())
        # Instead of the count one weight is read; per row logsumexp and loss are written, and what is asked.
        assert len(kernel.loads()) == len(plain.loads()), variant
        more = 6 if "CORRECT" in VARIANTS[variant] else 4  # an ignored row has stores of its own
        assert len(kernel.stores()) == len(plain.stores()) + more, variant


@compiled_only
@pytest.mark.parametrize("target", TARGETS)
def test_shard_kernels_compile_without_spills_in_wide_accesses(target, tmp_path):
    from velopath.kernels import sharded_rows

    config = sharded_rows.shard_config(64128, 2)
    warps = config.pop("num_warps")
    common = {"LOGITS": "*bf16", "TARGETS": "*i64", "stride_row": "i32", "n_cols": "i32", "n_load": "i32"}
    for kernel, more in ((sharded_rows.shard_statistics, "OUT"), (sharded_rows.shard_gradient, "FACTORS")):
        constants = {"LOGIT_SCALE": 0.5, "SOFTCAP": 30.0, **config}
        compiled = compile_for(
            target,
            kernel,
            common | {more: "*fp32"},
            {n: v for n, v in constants.items() if n in kernel.arg_names},
            num_warps=warps,
            aligned=("LOGITS", "TARGETS", more, "stride_row", "n_load"),
            folder=tmp_path,
        )
        assert compiled.atomics() == []
        if triton.__version__ == PINNED and target != "gfx942":
            assert compiled.local_bytes == 0
            assert any(i.endswith(".v4.b32") for i in compiled.loads())


@compiled_only
def test_unaligned_rows_compile_too(tmp_path):
    kernel = row_kernel("sm_90", "bf16", 50257, tmp_path, aligned=False)
    assert kernel.atomics() == []


@compiled_only
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_reduction_compiles_without_atomics(target, tmp_path):
    from velopath.kernels import domain_sums

    stage_1 = {
        "NATS": "*fp32",
        "TARGETS": "*i64",
        "DOMAINS_OF": "*i32",
        "NATS_PART": "*fp32",
        "TOKENS_PART": "*i32",
        "TOTAL_PART": "*fp32",
        **dict.fromkeys(("n_rows", "n_domains", "repeat", "ignore_index"), "i32"),
    }
    stage_2 = {
        "NATS_PART": "*fp32",
        "TOKENS_PART": "*i32",
        "TOTAL_PART": "*fp32",
        "COUNTED": "*i64",
        "LOSS": "*fp32",
        "SUMS": "*fp32",
        **dict.fromkeys(("n_blocks", "n_domains"), "i32"),
    }
    more = {"LOSSES": "*fp32", "CORRECT": "*fp32", "CORRECT_PART": "*i32"}
    for kernel, arguments, rows in (
        (domain_sums.partial_sums, stage_1, domain_sums.ROWS),
        (domain_sums.partial_sums, stage_1 | more, domain_sums.ROWS),
        (domain_sums.total_sums, stage_2, 32),
        (domain_sums.total_sums, stage_2 | {"CORRECT_PART": "*i32"}, 32),
    ):
        compiled = compile_for(
            target,
            kernel,
            arguments,
            {"BLOCK_ROWS": rows, "BLOCK_DOMAINS": domain_sums.DOMAINS}
            | {n: None for n in more if n in kernel.arg_names and n not in arguments},
            num_warps=4,
            aligned=tuple(n for n, kind in arguments.items() if kind.startswith("*")),
            folder=tmp_path,
        )
        assert compiled.atomics() == []
        if triton.__version__ == PINNED:
            assert compiled.local_bytes == 0


@compiled_only
@pytest.mark.parametrize("vocab", [32000, 128256])
def test_row_kernel_compiles_for_amd(vocab, tmp_path):
    kernel = row_kernel("gfx942", "bf16", vocab, tmp_path)
    assert kernel.atomics() == []
    if triton.__version__ == PINNED:
        assert re.search("(global|buffer)_load_dwordx4", kernel.assembly)
        assert re.search("(global|buffer)_store_dwordx4", kernel.assembly)
        assert set(re.findall(r"spill_count: +(\d+)", kernel.assembly)) == {"0"}


@compiled_only
def test_scaling_compiles(tmp_path):
    from velopath.kernels.rows import scale_elements

    for target in TARGETS:
        compile_for(
            target,
            scale_elements,
            {"X": "*bf16", "FACTOR": "*fp32", "n_elements": "i32"},
            {"BLOCK": 4096},
            num_warps=8,
            aligned=("X", "FACTOR", "n_elements"),
            folder=tmp_path,
        )
