"""Triton kernels, whose reference is `velopath.loss.reference`. Importing one imports triton.

They run on a GPU, and under TRITON_INTERPRET=1 (set before triton is first imported) on CPU tensors.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from velopath.errors import ConfigError


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """The context to launch a kernel in: the tensor's GPU made current, nothing under the interpreter.

    Raises `ConfigError` for a CPU tensor without the interpreter.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            "backend='triton' got a CPU tensor; move it to a GPU, or set TRITON_INTERPRET=1 before triton "
            "is imported"
        )
    return nullcontext()
