"""The loss in two processes: a sharded vocabulary against one process in fp64; under DDP, FSDP2, checkpointing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loss_option_cases import OPTIONS
from velopath.errors import ConfigError
from velopath.loss import linear_domain_cross_entropy

CHECKS = [
    *(f"{name}, {backend}" for name in OPTIONS for backend in ("reference", "cpu", "numba")),
    "another cut",
    "compiled",
    "DDP",
    "DDP, checkpointed",
    "FSDP2",
    "FSDP2, checkpointed",
]


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory) -> list[dict[str, list[str]]]:
    store = tmp_path_factory.mktemp("store") / "ranks"
    script = Path(__file__).with_name("distributed_loss.py")
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), store],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        results.append(json.loads(out))
    assert all(sorted(result) == sorted(CHECKS) for result in results)
    return results


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_match_one(both_ranks, check):
    assert [result[check] for result in both_ranks] == [[], []]


def test_main_gradient_is_added_once_under_checkpointing():
    hidden = torch.randn(6, 4, requires_grad=True)
    weight, main_grad = torch.randn(9, 4, requires_grad=True), torch.zeros(9, 4)
    targets, domains = torch.arange(6), torch.zeros(6, dtype=torch.int64)

    def loss(h):
        return linear_domain_cross_entropy(h, weight, targets, domains, n_domains=1, main_grad=main_grad)[0]

    torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False).backward()
    once = main_grad.clone()
    main_grad.zero_()
    loss(hidden).backward()
    assert torch.equal(main_grad, once) and once.abs().max() > 0


def test_something_else_than_a_process_group_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    try:
        with pytest.raises(
            ConfigError, match="process_group is a int; expected a torch.distributed.ProcessGroup"
        ):
            ids = torch.zeros(2, dtype=torch.int64)
            linear_domain_cross_entropy(
                torch.ones(2, 3), torch.ones(5, 3), ids, ids, n_domains=1, process_group=5
            )
    finally:
        torch.distributed.destroy_process_group()
