"""Remote data against moto's S3 server, which knows nothing of us; `make moto` runs it.

    PYTHONPATH=tests python -m interop.moto_check --venv .venv-moto --results tests/interop/results

Makes the environment where it is missing (moto with its server, about 60 packages, 320 MB), starts the server on a free
port, uploads three small domains through obstore and compares what is listed and read with the local folders. The tests
use tests/object_server.py instead: it checks signatures, needs no package, and stalls, cuts and corrupts on demand.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import socket
import subprocess
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import obstore
import obstore.store

from velopath import __version__, open_sampler
from velopath.cache import Cache
from velopath.errors import DataError
from velopath.mds import MdsWriter, load_index
from velopath.remote import FetchPolicy, MissingError, folders, read
from velopath.stream import Sampler

MOTO = "5.2.5"
DOMAINS = ("plain", "c#", "50% off")
OPTIONS = {"rows": 2, "row_tokens": 32, "seed": 5, "window": 2}


@contextmanager
def server(environment: Path) -> Iterator[str]:
    """URL of a fresh moto server."""
    if not (environment / "bin" / "moto_server").exists():
        print(f"making {environment} with moto {MOTO}", flush=True)
        venv.create(environment, with_pip=True)
        pip = [environment / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, f"moto[s3,server]=={MOTO}"], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        environment / "bin" / "python",
        environment / "bin" / "moto_server",
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for attempt in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/data.json").close()
                break
            except OSError:
                if attempt == 299 or process.poll() is not None:
                    raise
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def fill(root: Path, url: str) -> None:
    """Three domains below `root`, and the same as s3://bucket/data."""
    for k, name in enumerate(DOMAINS):
        rng = np.random.default_rng(k)
        with MdsWriter(root / name, compression="zstd", size_limit=3000) as writer:
            for _ in range(100):
                writer.write(rng.integers(1, 60_000, int(rng.integers(50, 150))).astype(np.uint16))
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    store = obstore.store.S3Store("bucket", endpoint=url, client_options={"allow_http": True})
    for file in sorted(root.rglob("*.*")):
        obstore.put(store, f"data/{file.relative_to(root).as_posix()}", file.read_bytes())


def same_stream(root: Path, cache: Path) -> None:
    """40 steps, a push, a resume, in a cache that holds a part: as from the local folder."""
    far = open_sampler("s3://bucket/data", cache=cache, cache_limit=30_000, **OPTIONS)
    with far, open_sampler(root, order="windowed", **OPTIONS) as near:
        both: tuple[Sampler, Sampler] = (far, near)
        state = near.state_dict()
        for step in range(120):
            if step == 40:
                for sampler in both:
                    sampler.push({"plain": 0.2, "c#": 0.2, "50% off": 0.6})
            if step == 80:
                for sampler in both:
                    sampler.load_state_dict(state)
            a, b = next(far), next(near)
            assert np.array_equal(a.tokens, b.tokens), f"step {step} differs"
            assert np.array_equal(a.row_ids, b.row_ids), f"rows of step {step} differ"


def listed() -> None:
    found = folders("s3://bucket/data")
    assert found == sorted(DOMAINS), f"found {found}"


def refused(call: Callable[[], object], error: type[Exception]) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"expected {error.__name__}")


def missing() -> None:
    quick = FetchPolicy(attempts=2, backoff_seconds=0)
    refused(lambda: read("s3://bucket/x", policy=quick), MissingError)
    refused(lambda: read("s3://none/x", policy=quick), MissingError)


def damaged(url: str, cache: Path) -> None:
    """A shard overwritten in the store: refused by its hash."""
    entry = load_index("s3://bucket/data/plain").shards[0]
    place = entry.place.removeprefix("s3://bucket/")
    store = obstore.store.S3Store("bucket", endpoint=url, client_options={"allow_http": True})
    content = bytearray(read(entry.url or ""))
    content[len(content) // 2] ^= 1
    obstore.put(store, place, bytes(content))
    refused(lambda: Cache(cache).hold(entry), DataError)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check remote data against moto's S3 server.")
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as scratch, server(given.venv) as url:
        root, start = Path(scratch, "data"), time.monotonic()
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            del os.environ[name]
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "some",
            "AWS_SECRET_ACCESS_KEY": "thing",
            "AWS_REGION": "us-east-1",
        }
        os.environ["AWS_ENDPOINT_URL"] = url
        fill(root, url)
        cases: dict[str, Callable[[], object]] = {
            "folders are listed, with # and % in their names": listed,
            "the same stream as from the local folder": lambda: same_stream(root, Path(scratch, "a")),
            "a missing object and a missing bucket are named": missing,
            "a damaged object is refused": lambda: damaged(url, Path(scratch, "b")),
        }  # fmt: skip
        for name, case in cases.items():
            try:
                case()
                lines.append(f"| {name} | as expected |")
            except Exception as error:
                lines.append(f"| {name} | **{type(error).__name__}: {error}** |")
        seconds = time.monotonic() - start
    about = f"velopath {__version__}, obstore {obstore.__version__}, Python {platform.python_version()}"
    head = [
        f"# Remote data from moto {MOTO}",
        "",
        f"{datetime.date.today()}, {about}; `make moto`, {seconds:.0f} s.",
    ]
    given.results.mkdir(parents=True, exist_ok=True)
    result = given.results / f"{datetime.date.today()}-moto.md"
    result.write_text("\n".join([*head, "", "| case | |", "| --- | --- |", *lines]) + "\n")
    print("\n".join(lines), f"\n{result}")
    return 1 if any("**" in line for line in lines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
