"""`python -m velopath`, for launchers such as torchrun."""

from velopath.cli import main

main()
