"""Other published rules for domain weights, behind the same interface as Velocitune: to be compared with."""

from __future__ import annotations

from velopath.rivals.ado import Ado
from velopath.rivals.dynamic_batch import DoReMi, DynamicBatchLoading
from velopath.rivals.odm import Odm

__all__ = ["Ado", "DoReMi", "DynamicBatchLoading", "Odm"]
