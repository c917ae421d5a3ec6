"""What a call of the per-domain cross-entropy can be asked for beyond the plain mean.

With r the logits of a row as given, t its target, V columns:
    x = c tanh(s r / c)          c `softcap` (none: x = s r), s `logit_scale`
    lse = log sum_v exp(x_v)     nats = lse - x_t
    L = (1 - e) nats + e (lse - mean_v x_v) + z lse^2        e `label_smoothing`, z `z_loss`
    dL/dr_v = (p_v (1 + 2 z lse) - (1 - e) [v = t] - e / V) * s (1 - (x_v / c)^2),   p = softmax(x)
The loss is the sum of w_n L_n over counted rows, w_n the weight of the row's domain, over their number for a mean.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class RowOptions:
    """What changes the loss of a row; the defaults are the plain negative log-likelihood. `softcap` 0 is none."""

    logit_scale: float = 1.0
    softcap: float = 0.0
    label_smoothing: float = 0.0
    z_loss: float = 0.0


PLAIN = RowOptions()


class Settings(NamedTuple):
    """The options of a call in the order in which operators take them: plain numbers and words, no tensor.

    `group` names the process group that the vocabulary is sharded over, "" none; `tokens` and `accuracy` say
    what is returned beside loss and sums.
    """

    n_domains: int
    ignore_index: int
    logit_scale: float
    softcap: float
    label_smoothing: float
    z_loss: float
    reduction: str
    tokens: bool
    accuracy: bool
    group: str
    backend: str

    @property
    def rows(self) -> RowOptions:
        """What changes the loss of a row."""
        return RowOptions(self.logit_scale, self.softcap, self.label_smoothing, self.z_loss)


@dataclass(frozen=True)
class Details:
    """What rows need and write where more than plain nats are asked for, all of one length.

    `scales` multiply each row's loss and gradient (its domain's weight over the denominator). Written: `lse`,
    `losses` (scaled) and, unless None, `correct`, 1 where the target is the first largest logit.
    """

    options: RowOptions
    scales: Tensor
    lse: Tensor
    losses: Tensor
    correct: Tensor | None

    def __getitem__(self, part: slice) -> Details:
        correct = None if self.correct is None else self.correct[part]
        return Details(self.options, self.scales[part], self.lse[part], self.losses[part], correct)

    def keywords(self) -> dict[str, Any]:
        """As keywords of a kernel."""
        tensors = {"scales": self.scales, "lse": self.lse, "losses": self.losses, "correct": self.correct}
        return asdict(self.options) | tensors
