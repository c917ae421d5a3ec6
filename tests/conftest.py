"""Shared fixtures: small token data written by the project's own writer, and one model's worth of settings."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from velopath.mds.write import MdsWriter

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two small kernels on two busy cores wait for each other
VOCABULARY = 64
EOS = 0
FILE_LIMIT = resource.getrlimit(resource.RLIMIT_FSIZE)


def write_domain(folder: Path, seed: int, documents: int, length: int = 90, period: int = 7) -> int:
    """Documents of noisy arithmetic progressions, learnable and different per seed; returns the tokens written."""
    rng = np.random.default_rng(seed)
    total = 0
    with MdsWriter(folder, dtype="uint16") as writer:
        for _ in range(documents):
            n = int(rng.integers(length // 2, length))
            start, stride = rng.integers(1, VOCABULARY), 1 + seed % period
            tokens = 1 + (start + stride * np.arange(n)) % (VOCABULARY - 1)
            noise = rng.random(n) < 0.1
            tokens[noise] = rng.integers(1, VOCABULARY, noise.sum())
            writer.write(tokens.astype(np.uint16))
            total += n
    return total


def write_data(
    root: Path, names: tuple[str, ...] = ("code", "prose", "tables"), documents: int = 120
) -> Path:
    """A prepared folder with train and heldout splits and its domains.json."""
    domains = {}
    for k, name in enumerate(names):
        tokens = write_domain(root / "train" / name, seed=k + 1, documents=documents * (k + 1))
        held = write_domain(root / "heldout" / name, seed=k + 1, documents=30)
        domains[name] = {
            "tokens": tokens + documents * (k + 1),
            "documents": documents * (k + 1),
            "bytes": 2 * tokens,
            "heldout_tokens": held + 30,
            "heldout_documents": 30,
            "licence": "CC0-1.0",
            "source": "made for tests",
            "hash": f"{k:016x}",
        }
    table = {"version": 1, "eos": EOS, "dtype": "uint16", "domains": domains}
    table["tokenizer"] = {"file": "tokenizer.json", "sha256": "", "vocab_size": VOCABULARY}
    (root / "domains.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with three domains of about 8k, 16k and 24k tokens, 64 entries, end-of-text 0."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """Lets no file of this process grow beyond so many bytes (EFBIG), as a full disk would: works for every user."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, FILE_LIMIT[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, FILE_LIMIT)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, object, object]:
    """Lift a test's file limit before pytest writes what became of it: its own output may be a file, too."""
    try:
        return (yield)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, FILE_LIMIT)
