"""How separable domains are: divergences against scipy's, their noise by simulation, shared documents by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import typer
from scipy.spatial.distance import jensenshannon
from typer.testing import CliRunner

from velopath.cli.inspect import inspect
from velopath.inspection import inspect_data
from velopath.inspection_separation import divergence, document_hashes, noise, separate, token_use
from velopath.mds import MdsWriter


@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_that_of_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (rng.zipf(1.3, 400) % 1000 * rng.integers(0, 2, 400) for _ in range(2))
    expected = jensenshannon(first, second, base=2) ** 2
    assert divergence(first, second) == pytest.approx(expected, abs=1e-12)
    assert divergence(first, 7 * first) == pytest.approx(0, abs=1e-12)


def test_divergence_at_its_ends() -> None:
    assert divergence(np.array([5, 0]), np.array([0, 9])) == 1.0
    assert divergence(np.zeros(2, np.int64), np.array([0, 9])) == pytest.approx(0.5)  # one of them is empty


def test_noise_is_what_samples_of_one_distribution_show() -> None:
    rng = np.random.default_rng(1)
    shares = 1 / np.arange(2, 302)
    shares /= shares.sum()
    for n, m in ((20_000, 20_000), (50_000, 8_000)):
        seen = [divergence(rng.multinomial(n, shares), rng.multinomial(m, shares)) for _ in range(40)]
        expected = noise(rng.multinomial(n, shares), rng.multinomial(m, shares))
        assert np.mean(seen) == pytest.approx(expected, rel=0.1)


def test_token_use() -> None:
    counts = np.zeros(200, np.int64)
    counts[[3, 50]] = 8, 24
    use = token_use(counts)
    assert (use.tokens, use.used) == (32, 2)
    assert use.commonest == ((50, 0.75), (3, 0.25))
    assert use.entropy == pytest.approx(0.75 * np.log2(4 / 3) + 0.25 * 2)
    assert use.by_rank == (1.0,)
    even = token_use(np.ones(200, np.int64))
    assert even.by_rank == pytest.approx((0.05, 0.45, 0.5))
    assert even.entropy == pytest.approx(np.log2(200))
    assert token_use(np.zeros(3, np.int64)).used == 0


def test_hashes_do_not_depend_on_the_stored_type() -> None:
    document = np.array([1, 2, 60_000])
    kinds = [document_hashes([document.astype(t)])[0] for t in ("uint16", "uint32", "int32", "int64")]
    assert len(set(kinds)) == 1
    assert document_hashes([document[:2], document[:1]])[0] != kinds[0]


def test_advice() -> None:
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(100), 3)
    counts = {n: rng.multinomial(40_000, s) for n, s in zip("abc", shares, strict=True)}
    counts["d"] = rng.multinomial(40_000, shares[0])
    counts["e"] = rng.multinomial(40_000, (2 * shares[1] + shares[2]) / 3)
    hashes = {n: np.arange(100, dtype=np.uint64) + 1000 * k for k, n in enumerate("abcde")}
    hashes["c"][:7] = hashes["b"][:7]
    found = separate(counts, hashes)
    assert len(found.pairs) == 10
    said = " ".join(found.advice)
    assert "a and d use nearly the same tokens" in said
    assert "Merge them" in said
    assert "b and c share 7 documents, 7 % of the smaller one" in said
    assert said.count("share") == 1
    apart = separate({n: counts[n] for n in "ac"}, {n: hashes[n] for n in "ac"})
    assert apart.advice[0].startswith(
        f"Every two domains lie at least {apart.pairs[0].divergence:.2f} bits apart"
    )


def test_many_domains_and_large_ids(tmp_path: Path) -> None:
    for name in "abcdefghijklm":
        with MdsWriter(tmp_path / name, dtype="uint32") as writer:
            writer.write([ord(name), 1, 2, 3])
            writer.write([1 << 30] if name == "m" else [1])
    found = inspect_data(tmp_path)
    assert found.separation is not None
    assert len(found.separation.pairs) == 12 * 11 / 2  # m has ids too large to count
    assert found.domains[-1].token_use is None
    assert all(pair.shared == 1 for pair in found.separation.pairs)
    app = typer.Typer()
    app.command()(inspect)
    shown = CliRunner().invoke(app, [str(tmp_path)], env={"COLUMNS": "200"}).stdout
    assert "closest pairs" in shown
    assert inspect_data(tmp_path, domain="a").separation is None
