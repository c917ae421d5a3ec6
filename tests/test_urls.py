"""Places that are a path or a URL, and what is shown of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from velopath.errors import ConfigError
from velopath.remote import FetchPolicy
from velopath.urls import below, is_url, last_name, parent, redact, redact_text

SECRET_KEY = "velopath-secret-key-of-the-tests"


@pytest.mark.parametrize(
    ("place", "inner", "name"),
    [
        ("s3://bucket", "s3://bucket/a/b", ""),
        ("s3://bucket/data/", "s3://bucket/data/a/b", "data"),
        ("https://u:p@host/x?sig=y", "https://u:p@host/x/a/b?sig=y", "x"),
        ("data/2026", Path("data/2026/a/b"), "2026"),
        ("s3://bucket/c%23", "s3://bucket/c%23/a/b", "c#"),
        ("memory://c#?", "memory://c#?/a/b", ""),
        (Path("/data"), Path("/data/a/b"), "data"),
    ],
)
def test_places_are_joined_and_named(place: str | Path, inner: str | Path, name: str) -> None:
    assert below(place, "a", "b") == inner
    assert last_name(place) == name
    assert is_url(place) == isinstance(inner, str)
    if isinstance(inner, str):
        assert parent(parent(inner)) == str(place).replace("data/", "data")


def test_secrets_of_the_environment_are_cut_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    text = f"<Key>{SECRET_KEY}</Key> at s3://a:b@c/d?e=f 'https://x/y?z'"
    assert redact_text(text) == "<Key>***</Key> at s3://***@c/d?*** 'https://x/y?***'"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://me:p@ss@host/a@b", "http://***@host/a@b"),
        ("http://me:it's 'mine'@host/x?sig=a)b'c d", "http://***@host/x?***"),
        ("s3://bucket/c#", "s3://bucket/c#"),
        ("az://box/x?sig=abc%2Fdef%2Bghi", "az://box/x?***"),
        ("https://host", "https://host"),
    ],
)
def test_credentials_of_any_shape_are_cut_out(url: str, shown: str) -> None:
    assert redact(url) == shown
    text = redact_text(f"error at {url} (403) with sig a)b'c d and abc/def+ghi", url)
    for secret in ("p@ss", "ss@host", "it's", "mine", "a)b'c d", "abc/def", "abc%2Fdef"):
        assert secret not in text or secret not in url


def test_what_a_url_would_take_for_something_else_is_encoded() -> None:
    assert below("https://host/x?sig=y", "c#", "50%?") == "https://host/x/c%23/50%25%3F?sig=y"
    assert last_name(below("s3://bucket", "50%?")) == "50%?"


def test_policy() -> None:
    policy = FetchPolicy(backoff_seconds=1, longest_seconds=5)
    for attempt, most in enumerate((1, 2, 4, 5, 5)):
        assert all(most / 2 <= policy.delay(attempt) <= most for _ in range(20))
    with pytest.raises(ConfigError, match="attempts=0.*expected 1 attempt or more"):
        FetchPolicy(attempts=0)
