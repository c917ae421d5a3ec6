"""What a run ran on and with: hardware and versions, for run.json and for dated benchmark results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("velopath", "torch", "triton", "numpy", "numba", "tokenizers", "safetensors")
PEAK_FLOPS = {
    "B200": 2250e12,
    "GB200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 191e12,
}
"""Dense bf16 FLOP/s by the makers' data sheets; the name is part of the device's. MI250X: one of its two dies."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s that the maker states for this GPU; None on a CPU and where it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = f" {name.replace('-', ' ')} "
    return next((peak for known, peak in PEAK_FLOPS.items() if f" {known} " in words), None)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """{"versions": {package: version}, "hardware": {what: value}}; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    versions["torch"] = str(torch.__version__)  # with its build: which CUDA a figure was measured on
    hardware = {
        "device": str(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {"versions": versions, "hardware": hardware}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
