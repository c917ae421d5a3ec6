"""The bars: what a result is measured against, fixed before it was measured. A missed one stays in the report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """`value` is wanted `sense` ("<=" or ">=") `limit`; `value` None or NaN: not measured."""

    name: str
    sense: str
    limit: float
    value: float | None

    def __post_init__(self) -> None:
        if self.sense not in ("<=", ">="):
            raise ValueError(f"sense is {self.sense!r}; expected '<=' or '>='")

    @property
    def met(self) -> bool | None:
        if self.value is None or math.isnan(self.value):
            return None
        return self.value <= self.limit if self.sense == "<=" else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sense": self.sense,
            "limit": self.limit,
            "value": None if self.met is None else self.value,
            "met": self.met,
        }


def sampler_bars(result: Result) -> list[Bar]:
    """Ratios of tokens/s to a peer in its fastest setting; first batch, memory and pushes as medians of processes.

    `step_bars` judges a push in training; here a step is a sleep, so that nothing else moves.
    """
    raw, zstd, epoch = (result["ratios"][name] for name in ("raw-thread", "zstd-thread", "zstd-epoch"))
    limits = result["limits"]
    allowed = 64 + limits["domains"] * limits["shard_mib"]
    push = {name: statistics.median(longest) for name, longest in limits["push"].items()}
    return [
        Bar("raw shards / mosaicml-streaming packing documents", ">=", 100, raw.get("mosaic-documents")),
        Bar("zstd shards / mosaicml-streaming packing documents", ">=", 50, zstd.get("mosaic-documents")),
        Bar("raw shards / (memcpy / 8)", ">=", 0.25, raw["memcpy"]),
        Bar("raw shards / numpy memmap", ">=", 1.5, raw["memmap"]),
        Bar("zstd shards / libzstd", ">=", 0.3, zstd["libzstd"]),
        Bar("zstd shards, first epoch with an empty cache / libzstd", ">=", 0.3, epoch["libzstd"]),
        Bar(
            f"seconds to the first batch of {limits['documents'] / 1e6:g}M documents",
            "<=",
            0.1,
            statistics.median(limits["first_batch_seconds"]),
        ),
        Bar("private MiB over the imports", "<=", allowed, statistics.median(limits["private_mib"])),
        Bar("longest step / median, with pushes", "<=", 1.05, push["push"]),
        Bar("longest step / median, with pushes and an audit log", "<=", 1.05, push["push-audit"]),
    ]


def wait_bars(result: Result) -> list[Bar]:
    """What the sampler takes of a step of 50 ms; where the step wants the reader's core too, in the median."""
    device, host = (result["kinds"][kind]["sampler"] for kind in ("device", "host"))
    median = host["wait_us"][0] / 1e3 / host["step_ms"]
    return [
        Bar("all waits / all steps, device step", "<=", 0.005, device["wait_share"]),
        Bar("median wait / median step, host step", "<=", 0.005, median),
    ]


def soak_bars(result: Result) -> list[Bar]:
    """Growth over the soak; memory may move by the size of an arena of the allocator."""
    limits = {"resident_mib": 4, "file_descriptors": 0, "threads": 0, "objects": 20}
    return [Bar(f"growth of {name}", "<=", most, result["growth"][name]) for name, most in limits.items()]


def scale_bars(result: Result) -> list[Bar]:
    """The state's limit is the project's; the others are our choice."""
    median = {name: statistics.median(values) for name, values in result["samples"].items()}
    return [
        Bar("bytes of state", "<=", 1 << 20, median["state_bytes"]),
        Bar("seconds of CPU to open", "<=", 5, median["open_cpu_seconds"]),
        Bar("private MiB over the imports", "<=", 256, median["anonymous_mib"]),
        Bar("ms of CPU to plan a step of 512 rows", "<=", 1, median["plan_ms"]),
    ]


def loss_bars(result: Result) -> list[Bar]:
    """The CPU's: from logits in place, and from hidden states in chunks."""
    logits, linear = result["logits"]["contenders"], result["linear"]["contenders"]
    core, chunks = logits["velopath C++, in place"], linear["velopath C++, chunks of 64 MiB"]
    eager_linear = linear["eager, with domains"]

    def times_as_fast(name: str, as_name: str) -> float | None:
        if name not in logits or as_name not in logits:
            return None
        return float(logits[as_name]["ms"]["median"] / logits[name]["ms"]["median"])

    eager, in_place = "eager, with domains", "velopath C++, in place"
    compiled = times_as_fast(in_place, "torch.compile, with domains")
    return [
        Bar("C++ in place: times as fast as eager", ">=", 5, times_as_fast(in_place, eager)),
        Bar("C++ in place: times as fast as torch.compile", ">=", 2, compiled),
        Bar("C++ in place: extra MiB", "<=", 1, core["extra_mib"]),
        Bar(
            "numba in place: times as fast as eager",
            ">=",
            2.5,
            times_as_fast("velopath numba, in place", eager),
        ),
        Bar(
            "hidden states in chunks: time / eager",
            "<=",
            1.1,
            chunks["ms"]["median"] / eager_linear["ms"]["median"],
        ),
        Bar(
            "hidden states in chunks: extra memory / eager",
            "<=",
            0.15,
            chunks["extra_mib"] / eager_linear["extra_mib"],
        ),
    ]


def step_bars(result: Result, *, where: str = "") -> list[Bar]:
    """Our choice: the loop may cost nothing beside a plain one, and data, push and log are not to be felt.

    Ratios whose contenders did not run are "not measured"; `where` goes before the names.
    """
    ratios, push = result["ratios"], result["push"]
    velopath = result["contenders"]["velopath"]
    return [
        Bar(
            f"{where}tokens/s of the loop / best plain torch loop",
            ">=",
            1.0,
            ratios.get("speed over plain loop"),
        ),
        Bar(f"{where}share of a step spent waiting for data", "<=", 0.01, velopath["wait_share"]["median"]),
        Bar(
            f"{where}step with domain losses / with F.cross_entropy", "<=", 1.01, ratios.get("domain losses")
        ),
        Bar(f"{where}step with logging / without", "<=", 1.01, ratios.get("logging")),
        Bar(f"{where}step right after a push / other steps", "<=", 1.05, push["ratio"]),
    ]


def gpu_bars(parts: Result) -> list[Bar]:
    """The GPU's, of the parts that were run; `parts` maps a part's name to its result."""
    bars = list(_check_bars(parts.get("checks", {})))
    for name, bars_of in (("logits", _logits_bars), ("linear", _linear_bars), ("domains", _domains_bars)):
        if name in parts:
            bars += bars_of(parts[name], parts.get("ceilings", {}))
    for name, where in (("step", "160M: "), ("step_1b", "1B: ")):
        if name in parts:
            bars += [bar for bar in step_bars(parts[name], where=where) if bar.met is not None]
    return bars


def _check_bars(checks: Result) -> Iterator[Bar]:
    """A failed check is 1, so that it shows among the bars as missed."""
    for name, found in checks.items():
        yield Bar(f"check: {name}", "<=", 0, 0.0 if found["ok"] else 1.0)


def _logits_bars(result: Result, ceilings: Result) -> Iterator[Bar]:
    copy = ceilings.get("copy_bytes_per_second")
    for part in result["shapes"]:
        limit = {32000: 0.83, 128256: 0.75}.get(part["vocab"])
        ours = part["contenders"].get("velopath, in place")
        if limit is None or ours is None:
            continue
        # Every logit is read and its gradient written.
        rate = 2 * part["rows"] * part["vocab"] * part["itemsize"] / (ours["ms"]["median"] / 1e3)
        yield Bar(
            f"logits in place, V={part['vocab']}: bytes/s over the copy's",
            ">=",
            limit,
            rate / copy if copy else None,
        )


def _linear_bars(result: Result, ceilings: Result) -> Iterator[Bar]:
    copy = ceilings.get("copy_bytes_per_second")
    for part in result["shapes"]:
        contenders, vocab = part["contenders"], part["vocab"]
        ours = contenders.get("velopath")
        if ours is None:
            continue
        ms = ours["ms"]["median"]
        floor = None
        if copy and "three matmuls" in contenders:
            traffic_ms = 2 * part["rows"] * vocab * part["itemsize"] / copy * 1e3
            floor = contenders["three matmuls"]["ms"]["median"] + traffic_ms
        where = f"linear, N={part['rows']} D={part['width']} V={vocab}"
        yield Bar(f"{where}: time / (three matmuls + logits' traffic)", "<=", 1.15, floor and ms / floor)
        yield Bar(
            f"{where}: extra memory / (chunk + gradient of hidden + fp32 gradient of the weight)",
            "<=",
            1.02,
            ours["extra_mib"] / part["allowed_mib"],
        )
        for peer, sense, limit in (("Liger", ">=", 3.0), ("QuACK", "<=", 1.10)):
            found = contenders.get(f"{peer}, without domains")
            if found is None:
                continue
            peer_ms = found["ms"]["median"]
            if peer == "Liger" and vocab == 128256:
                yield Bar(f"{where}: times as fast as {peer}", sense, limit, peer_ms / ms)
            elif peer == "QuACK":
                yield Bar(f"{where}: time / {peer}", sense, limit, ms / peer_ms)


def _domains_bars(result: Result, ceilings: Result) -> Iterator[Bar]:
    for count, found in result["domains"].items():
        yield Bar(f"domain sums, K={count}: time with / with plain sum and count", "<=", 1.01, found["ratio"])
