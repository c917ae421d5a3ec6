"""Compile Triton kernels for GPUs that are not there, and read what they use out of the binary."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """Assembly text, and for NVIDIA registers and bytes of local memory (spills) per thread."""

    assembly: str
    registers: int = 0
    local_bytes: int = 0

    def loads(self) -> list[str]:
        return re.findall(r"ld\.global[.\w:]*", self.assembly)

    def stores(self) -> list[str]:
        return re.findall(r"st\.global[.\w:]*", self.assembly)

    def atomics(self) -> list[str]:
        return re.findall(r"\b(?:atom|red)\.[.\w:]*|\b\w*_atomic_\w*", self.assembly)


def compile_for(
    target: str,
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int,
    aligned: tuple[str, ...],
    folder: Path,
) -> Compiled:
    """`arguments` are Triton types by name; `aligned` names those divisible by 16."""
    names = list(kernel.arg_names)
    compiled = triton.compile(
        ASTSource(
            fn=kernel,
            signature={n: arguments.get(n, "constexpr") for n in names},
            constexprs={(names.index(n),): v for n, v in constants.items()},
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        ),
        target=TARGETS[target],
        options={"num_warps": num_warps},
    )
    if target.startswith("gfx"):
        return Compiled(compiled.asm["amdgcn"])
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    text = subprocess.run(
        [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found, text
    return Compiled(compiled.asm["ptx"], int(found[1]), int(found[2]) + int(found[3]))
