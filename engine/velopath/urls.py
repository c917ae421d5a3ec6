"""Places that are a path or a URL: joined, named, and shown without credentials."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s'\"]+@")
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
    return redact_text(url)


def redact_text(text: str, url: str = "") -> str:
    """`text` without the credentials of URLs in it, of `url` in particular, and of the environment."""
    text = _SIGNED.sub(r"\1=***", _QUERY.sub(r"\1?***", _CREDENTIALS.sub("***@", text)))
    parts = urlsplit(url)
    secrets = [parts.query, parts.netloc.rpartition("@")[0], parts.password or ""]
    secrets += [value for values in parse_qs(parts.query).values() for value in values]
    secrets += [value for name, value in os.environ.items() if _SECRET_NAMES.match(name)]
    for secret in sorted({s for s in secrets if len(s) >= 6}, key=len, reverse=True):
        text = text.replace(secret, "***").replace(unquote(secret), "***")
    return text


def below(place: str | Path, *names: str) -> str | Path:
    """The folder or file `names` below a folder; the query of a URL stays at its end."""
    if not isinstance(place, str) or not is_url(place):
        return Path(place, *names)
    front, mark, query = place.partition("?")
    return "/".join([front.rstrip("/"), *names]) + mark + query


def parent(url: str) -> str:
    """The folder above."""
    front, mark, query = url.partition("?")
    return front.rstrip("/").rsplit("/", 1)[0] + mark + query


def last_name(place: str | Path) -> str:
    """The last name of a path or URL."""
    return Path(urlsplit(place).path).name if isinstance(place, str) and is_url(place) else Path(place).name
