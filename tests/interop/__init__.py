"""Compatibility with mosaicml-streaming 0.13, judged by the package itself: `make interop`."""
