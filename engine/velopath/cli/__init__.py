"""The `velopath` command. Each command is a file of its own; torch is imported only by those that compute."""

from velopath.cli.app import main

__all__ = ["main"]
