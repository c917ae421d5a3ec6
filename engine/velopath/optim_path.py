"""PathLR: a learning-rate path as a torch scheduler that refuses to go on along another path."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from velopath.config_change import differences
from velopath.errors import ConfigError
from velopath.schedule import LrPath
from velopath.schedule_tokens import TokenPath


class PathLR(LambdaLR):
    """torch's LambdaLR along `path`, for trainers that step a scheduler; step it after every update.

    A group made at rate g carries g / peak * rate(step); make groups at ``lr=path.peak`` to have the path's own rate.
    `state_dict` is JSON and holds the path: loading the state of another one raises `ConfigError` with the difference,
    where torch's schedulers take the new rate or the old one without a word. `changed_because` allows it; write that
    reason into your record.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        path: LrPath | TokenPath,
        *,
        changed_because: str | None = None,
    ) -> None:
        self._path = path
        self._changed_because = changed_because
        super().__init__(optimizer, path.multiplier)

    def state_dict(self) -> dict[str, Any]:
        """The step, the groups' own rates as shares of the peak, and the path."""
        shares = [float(rate) / self._path.peak for rate in self.base_lrs]
        return {"step": self.last_epoch, "shares": shares, "path": self._path.to_json()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at the saved step; the rate of the next update is that of the path there."""
        saved = state_dict["path"]
        old = (
            TokenPath.from_json(saved)
            if isinstance(saved, dict) and "unit" in saved
            else LrPath.from_json(saved)
        )
        if old != self._path and self._changed_because is None:
            raise ConfigError(
                "the saved state follows another learning-rate path:\n"
                + "\n".join(
                    f"  {key}: {before!r} -> {after!r}"
                    for key, before, after in differences(old.to_json(), self._path.to_json())
                )
                + "\nresume with the saved path, or give changed_because"
            )
        self.base_lrs = [share * self._path.peak for share in state_dict["shares"]]
        self.last_epoch = int(state_dict["step"])
        groups = self.optimizer.param_groups
        for group, own in zip(groups, self.base_lrs, strict=True):
            rate = own * self._path.multiplier(self.last_epoch)
            group["initial_lr"] = own
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = [group["lr"] for group in groups]
