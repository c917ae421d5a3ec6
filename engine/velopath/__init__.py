"""velopath: continual pre-training with Velocitune domain weights on learning-rate paths.

Importing this package imports neither torch nor the C++ core; each name is loaded when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from velopath.domains import DomainLoss as DomainLoss
    from velopath.domains import DomainTable as DomainTable
    from velopath.domains import MixtureWeights as MixtureWeights
    from velopath.loss import domain_cross_entropy as domain_cross_entropy
    from velopath.loss import linear_domain_cross_entropy as linear_domain_cross_entropy
    from velopath.mds import read_documents as read_documents
    from velopath.plan import compare_costs as compare_costs
    from velopath.schedule import LrPath as LrPath
    from velopath.session import Session as Session
    from velopath.stream import open_sampler as open_sampler
    from velopath.targets import fit_target as fit_target
    from velopath.velocity import Velocitune as Velocitune

_HOME = {
    "DomainLoss": "domains",
    "DomainTable": "domains",
    "MixtureWeights": "domains",
    "domain_cross_entropy": "loss",
    "linear_domain_cross_entropy": "loss",
    "read_documents": "mds",
    "compare_costs": "plan",
    "LrPath": "schedule",
    "Session": "session",
    "open_sampler": "stream",
    "fit_target": "targets",
    "Velocitune": "velocity",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'velopath' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"velopath.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
