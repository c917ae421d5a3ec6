"""The contenders of the loss benchmarks that are not other people's kernels, and how all of them are measured.

A contender takes leaves (logits, or hidden states and the output weight), targets and domains. Every contender's
loss and gradient are compared with eager torch's before it is timed. N rows, D width, V vocabulary, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import extra_mib, summary, take_turns, time_limit, timed
from velopath.loss import domain_cross_entropy, linear_domain_cross_entropy

DOMAINS = 8
EAGER = "eager, with domains"
"""The contender that the others agree with and are compared to."""

WARM_UP_SECONDS = 150.0
"""A contender that compiles or tunes for longer is left out."""

Contender = Callable[..., Any]
"""Returns the loss, or (loss, sums), to be differentiated; None where there is nothing to differentiate."""


# ---- contenders -------------------------------------------------------------------------------------------


def plain(logits: Tensor, targets: Tensor, domains: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def with_domains(logits: Tensor, targets: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes without velopath."""
    nats = F.cross_entropy(logits, targets, reduction="none").float()
    sums = torch.zeros(2, DOMAINS, device=logits.device)
    sums[0].index_add_(0, domains, nats.detach())
    sums[1].index_add_(0, domains, torch.ones_like(nats))
    return nats.mean(), sums


def ours(**options: Any) -> Contender:
    return partial(domain_cross_entropy, n_domains=DOMAINS, **options)


def ours_linear(**options: Any) -> Contender:
    return partial(linear_domain_cross_entropy, n_domains=DOMAINS, **options)


def then(forward: Contender) -> Contender:
    """`forward` on the logits of hidden states and weight."""
    return lambda hidden, weight, targets, domains: forward(hidden @ weight.t(), targets, domains)


def copy_of(logits: Tensor) -> Contender:
    """Reading and writing the logits once: what no kernel that makes their gradient can beat."""
    target = torch.empty_like(logits)

    def copy(leaf: Tensor, targets: Tensor, domains: Tensor) -> None:
        target.copy_(leaf.detach())

    return copy


def matmuls(rows: int, vocab: int, like: Tensor) -> Contender:
    """The products alone: logits, gradient of hidden, gradient of the weight."""
    logits = torch.zeros(rows, vocab, dtype=like.dtype, device=like.device)

    @torch.no_grad()
    def products(hidden: Tensor, weight: Tensor, targets: Tensor, domains: Tensor) -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    return products


def random_ids(device: torch.device, rows: int, vocab: int) -> tuple[Tensor, Tensor]:
    """Targets and domains, (N,) each."""
    targets = torch.randint(0, vocab, (rows,), device=device)
    return targets, torch.randint(0, DOMAINS, (rows,), device=device)


# ---- measuring --------------------------------------------------------------------------------------------


class Arena:
    """Leaves that every contender finds as they were: no gradients, and inputs that others wrote over restored."""

    def __init__(
        self, device: torch.device, originals: Sequence[Tensor], ids: Sequence[Tensor], *, overwritten: bool
    ) -> None:
        self.device, self.originals, self.ids, self.overwritten = device, originals, ids, overwritten
        self.leaves = tuple(x.clone().requires_grad_() for x in originals)
        self._out: Any = None

    def restore(self) -> None:
        self._out = None
        for leaf, original in zip(self.leaves, self.originals, strict=True):
            leaf.grad = None
            if self.overwritten:
                leaf.detach().copy_(original)

    def forward(self, contender: Contender) -> None:
        self._out = contender(*self.leaves, *self.ids)

    def backward(self) -> None:
        out, self._out = self._out, None
        if out is not None:
            (out[0] if isinstance(out, tuple) else out).backward()

    def sample(self, contender: Contender) -> list[float]:
        """Seconds of forward and of backward."""
        self.restore()
        return timed(self.device, lambda: self.forward(contender), self.backward)

    def extra_mib(self, contender: Contender) -> float:
        self.restore()

        def both() -> None:
            self.forward(contender)
            self.backward()

        # The gradient of a weight is the parameter's own, and exists in any training.
        parameters = sum(leaf.numel() * leaf.element_size() for leaf in self.leaves[1:])
        return extra_mib(self.device, both) - parameters / 2**20

    def values(self, contender: Contender) -> tuple[float, list[Tensor]] | None:
        """Loss and the first rows of the gradients, which say enough; None without a loss. Warms up, too."""
        self.restore()
        self.forward(contender)
        if self._out is None:
            return None
        loss = float((self._out[0] if isinstance(self._out, tuple) else self._out).detach())
        self.backward()
        grads = [leaf.grad for leaf in self.leaves]
        return loss, [g[:64].float().clone() for g in grads if g is not None]


def measure(
    arena: Arena, contenders: Mapping[str, Contender], *, rounds: int, seconds: float = math.inf
) -> dict[str, Any]:
    """{"rounds", "contenders": {name: {"ms", "forward_ms", "backward_ms", "extra_mib"}}, "left_out": [why]}.

    `extra_mib` is the peak over the inputs and over the gradient of a weight; the gradient of logits and of hidden
    states counts where it is new memory. A peer that fails or disagrees is left out, velopath must not.
    """
    reference = arena.values(contenders[EAGER])
    assert reference is not None
    good, extra, left_out = {}, {}, []
    for name, contender in contenders.items():
        try:
            with time_limit(WARM_UP_SECONDS):
                _agree(name, arena.values(contender), reference, arena.leaves[0].dtype)
                extra[name] = arena.extra_mib(contender)
                arena.sample(contender)
            good[name] = partial(arena.sample, contender)
        except Exception as error:
            if name.startswith("velopath"):
                raise
            left_out.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            arena.restore()
    samples = take_turns(good, rounds, seconds=seconds)
    arena.restore()
    return {
        "rounds": len(samples[EAGER]),
        "contenders": {name: _summary(s) | {"extra_mib": extra[name]} for name, s in samples.items()},
        "left_out": left_out,
    }


def _summary(samples: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {
        "ms": summary([1e3 * sum(s) for s in samples]),
        "forward_ms": summary([1e3 * s[0] for s in samples]),
        "backward_ms": summary([1e3 * s[1] for s in samples]),
    }


def _agree(
    name: str,
    got: tuple[float, list[Tensor]] | None,
    want: tuple[float, list[Tensor]],
    dtype: torch.dtype,
) -> None:
    if got is None:
        return
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(got[1], want[1], strict=True))
    if not (math.isclose(got[0], want[0], rel_tol=tolerance) and worst <= tolerance):
        raise AssertionError(
            f"{name}: loss {got[0]}, eager torch has {want[0]}; gradients differ by {worst:.2g}"
        )


def table_shapes(result: Mapping[str, Any]) -> str:
    """Markdown of {"shapes": [part], "left_out": [why]}, a part being a shape and what `measure` returned."""
    lines = []
    for part in result["shapes"]:
        width = f" D={part['width']}" if "width" in part else ""
        lines += [
            f"N={part['rows']}{width} V={part['vocab']}, {8 * part['itemsize']} bits, {part['rounds']} rounds",
            "",
            "| | ms | quartiles | forward | backward | extra MiB | times as fast as eager |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        eager = part["contenders"][EAGER]["ms"]["median"]
        for name, found in part["contenders"].items():
            ms = found["ms"]
            lines.append(
                f"| {name} | {ms['median']:.4g} | {ms['low']:.4g} to {ms['high']:.4g} "
                f"| {found['forward_ms']['median']:.4g} | {found['backward_ms']['median']:.4g} "
                f"| {found['extra_mib']:.0f} | {eager / ms['median']:.2f} |"
            )
        lines += ["", *(f"Left out: {why}." for why in part["left_out"]), ""]
    lines += [f"Left out: {why}." for why in result["left_out"]]
    return "\n".join(lines) + "\n"
