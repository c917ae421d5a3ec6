"""Where the points of the target laws lie, and how many steps they cost: pure, from the configuration alone."""

from __future__ import annotations

import math

from velopath.config_proxy import ProxyConfig
from velopath.errors import ConfigError


def proxy_points(proxy: ProxyConfig, warmup_steps: int) -> list[int]:
    """Steps at which the trunk is evaluated: `points` of them, evenly spread in log steps, the last at the end.

    The first lies at `first * steps`, and not inside the warm-up: a loss at a smaller rate belongs to another
    curve. Raises `ConfigError` where that leaves too few different steps.
    """
    first = max(round(proxy.first * proxy.steps), warmup_steps, 1)
    ratio = proxy.steps / first
    last = proxy.points - 1
    points = sorted({round(first * ratio ** (i / last)) for i in range(proxy.points)})
    if first >= proxy.steps or len(points) < proxy.points:
        raise ConfigError(
            f"proxy.steps {proxy.steps} leave no room for {proxy.points} points after step {first} "
            f"(warm-up {warmup_steps}); raise proxy.steps or lower proxy.points"
        )
    return points


def proxy_decays(proxy: ProxyConfig, warmup_steps: int) -> list[tuple[int, int]]:
    """(first, last) step of the short decays, one from each point; none where points are read undecayed."""
    if proxy.decay is None:
        return []
    points = proxy_points(proxy, warmup_steps)
    return [(point, point + decay_steps(point, proxy.decay)) for point in points]


def decay_steps(point: int, share: float) -> int:
    """Steps of a short decay over a share of the `point` steps done: half up, at least 1."""
    return max(1, math.floor(share * point + 0.5))


def training_steps(proxy: ProxyConfig, warmup_steps: int) -> int:
    """Steps that are trained for the points alone: the trunk's, unless they are the main path's, and the decays'."""
    trunk = proxy.steps if proxy.source == "trunk" else 0
    return trunk + sum(end - start for start, end in proxy_decays(proxy, warmup_steps))
