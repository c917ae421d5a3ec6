"""Triton kernels; each has a plain torch reference in `velopath.loss`."""
