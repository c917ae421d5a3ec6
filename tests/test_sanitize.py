"""The short form of `make sanitize`: the C++ core under ASan, UBSan and TSan, with g++ alone."""

from __future__ import annotations

from pathlib import Path

from fuzz.sanitize import SHORT_RUNS, THREADS, fuzz, race


def test_mutated_shards_give_tokens_or_an_error(tmp_path: Path) -> None:
    assert f"{SHORT_RUNS} runs, no finding" in fuzz(tmp_path)


def test_the_sampler_under_every_call_at_once(tmp_path: Path) -> None:
    assert "pushes, no finding" in race(tmp_path, THREADS)
