"""Places that are a path or a URL: joined, named, and shown without credentials."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

OBSTORE = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "http", "https")
"""Schemes whose URLs are percent-encoded; those of the others, which fsspec opens, are taken as they stand."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CREDENTIALS = re.compile(r"(?<=://)[^/?#\s'\"]+@")
_QUERY = re.compile(r"(://[^\s?'\")]*)\?[^\s'\")]*")
_SIGNED = re.compile(r"(?i)\b((?:x-amz-|x-goog-)[a-z-]+|signature|sig|token|password|secret)=[^&\s'\"<]+")
_SECRET_NAMES = re.compile(
    r"(?:AWS|GOOGLE|AZURE|S3|GS|GCS)_.*(?:KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIAL)", re.I
)


def is_url(place: object) -> bool:
    """Whether `place` is a URL, not a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def redact(url: str) -> str:
    """The URL without user, password and query, which may hold a signature."""
    scheme, mark, rest = url.partition("://")
    front, asked, query = rest.partition("?")
    host, slash, path = front.partition("/")
    user, at, host = host.rpartition("@")
    return redact_text(
        f"{scheme}{mark}{'***' if user else ''}{at}{host}{slash}{path}{asked}{'***' if query else ''}"
    )


def redact_text(text: str, url: str = "") -> str:
    """`text` without the credentials of URLs in it, of `url` in particular, and of the environment."""
    parts = urlsplit(url)
    secrets = [parts.query, parts.netloc.rpartition("@")[0], parts.password or ""]
    secrets += [value for values in parse_qs(parts.query).values() for value in values]
    secrets += [value for name, value in os.environ.items() if _SECRET_NAMES.match(name)]
    for secret in sorted({s for s in secrets if len(s) >= 6}, key=len, reverse=True):
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return _SIGNED.sub(r"\1=***", _QUERY.sub(r"\1?***", _CREDENTIALS.sub("***@", text)))


def below(place: str | Path, *names: str) -> str | Path:
    """The folder or file `names` below a folder; the query of a URL stays at its end.

    `names` are as a store lists them: what a URL would take for something else (a domain c#, a %) is encoded.
    """
    if not isinstance(place, str) or not is_url(place):
        return Path(place, *names)
    front, query = _split(place)
    if _encoded(place):
        names = tuple(name.replace("%", "%25").replace("?", "%3F").replace("#", "%23") for name in names)
    return "/".join([front.rstrip("/"), *names]) + query


def parent(url: str) -> str:
    """The folder above."""
    front, query = _split(url)
    return front.rstrip("/").rsplit("/", 1)[0] + query


def last_name(place: str | Path) -> str:
    """The last name of a path or URL."""
    if not isinstance(place, str) or not is_url(place):
        return Path(place).name
    name = Path(_split(place)[0].partition("://")[2].partition("/")[2]).name
    return unquote(name) if _encoded(place) else name


def _encoded(url: str) -> bool:
    return url.partition("://")[0].lower() in OBSTORE


def _split(url: str) -> tuple[str, str]:
    """What is in front of the query of a URL, and the query with its question mark."""
    front, mark, query = url.partition("?") if _encoded(url) else (url, "", "")
    return front, mark + query
