"""The folders that mosaicml-streaming wrote, kept as one archive in tests/data: packing and unpacking."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).parents[1] / "data" / "mosaic_streaming.zip"


def pack(root: Path, archive: Path = ARCHIVE) -> None:
    """All files below `root` into `archive`; the same files give the same bytes."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as packed:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            info = zipfile.ZipInfo(str(path.relative_to(root)), (2025, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_LZMA
            packed.writestr(info, path.read_bytes())


def unpack(root: Path, archive: Path = ARCHIVE) -> dict[str, Any]:
    """Unpack below `root`; returns expected.json (see `tests/interop/reference.py`)."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(root)
    expected: dict[str, Any] = json.loads((root / "expected.json").read_text())
    return expected
