"""Builds the C++ core with sanitizers and runs it: `make sanitize`; tests/test_sanitize.py runs the short form.

    python tests/fuzz/sanitize.py [--minutes M] [--folder build/sanitize]

fuzz_shard (ASan, UBSan): mutated shards give tokens or an error. push_race (TSan, then ASan and UBSan): the sampler
with pushes, questions and a close at once. The short form takes half a minute, M minutes are shared by the three.
Needs g++ (or $CXX); where clang++ is found, the fuzz target also runs under libFuzzer in the long form.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CORE = HERE.parents[1] / "csrc"
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
THREADS = ("-fsanitize=thread",)
IN_HEAP = ("-Dmmap=fuzz_mmap", "-Dmunmap=fuzz_munmap")  # see fuzz_shard.cpp
NEEDED = {"fuzz_shard": ("shard", "token_stream", "packing")}  # of the core; else all but bindings and loss
SHORT_RUNS, SHORT_STEPS = 25_000, 10_000


class Failed(RuntimeError):
    """A build or a run under a sanitizer ended badly; the message holds what it printed."""


def build(
    target: str, folder: Path, flags: Sequence[str], *, shard: Sequence[str] = (), compiler: str | None = None
) -> Path:
    """The program `target` of this folder with what it needs of the core; `shard` are flags for shard.cpp alone."""
    compiler = compiler or os.environ.get("CXX", "g++")
    out = folder / f"{target}-{compiler.rsplit('/', 1)[-1]}-{flags[0].split('=')[1].replace(',', '-')}"
    out.mkdir(parents=True, exist_ok=True)
    core = [p for p in sorted(CORE.glob("*.cpp")) if not p.name.startswith(("bind", "cross_entropy"))]
    sources = [HERE / f"{target}.cpp", *(p for p in core if p.stem in NEEDED.get(target, [p.stem]))]
    common = [compiler, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", f"-I{CORE}", *flags]

    def compiled(source: Path) -> Path:
        extra = shard if source.name == "shard.cpp" else ()
        run([*common, *extra, "-c", str(source), "-o", str(out / f"{source.stem}.o")])
        return out / f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    run([*common, *map(str, objects), "-o", str(out / target), "-pthread"])
    return out / target


def run(command: Sequence[str], timeout: float = 600) -> str:
    """What the command printed; raises `Failed` on another exit status than 0 or after `timeout` seconds."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout


def fuzz(folder: Path, seconds: float = 0) -> str:
    """Mutated shards under ASan and UBSan; the same ones each time, more of them for `seconds`."""
    program = str(build("fuzz_shard", folder, MEMORY, shard=IN_HEAP))
    return repeated(lambda k: run([program, str(SHORT_RUNS), str(k * SHORT_RUNS)]), seconds)


def race(folder: Path, flags: Sequence[str], seconds: float = 0) -> str:
    """The sampler under every call at once; another order of pushes each time."""
    program = str(build("push_race", folder, flags))
    return repeated(lambda k: run([program, str(SHORT_STEPS), str(k + 1)]), seconds)


def repeated(once: Callable[[int], str], seconds: float) -> str:
    start, times = time.monotonic(), 0
    while not times or time.monotonic() - start < seconds:
        printed = once(times)
        times += 1
    return f"{times} x {printed.strip()}"


def lib_fuzzer(folder: Path, clang: str, seconds: float) -> str:
    """The fuzz target with coverage feedback."""
    flags = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-DLIBFUZZER")
    program = build("fuzz_shard", folder, flags, shard=IN_HEAP, compiler=clang)
    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    command = [
        str(program),
        f"-max_total_time={round(seconds)}",
        "-timeout=20",
        f"-artifact_prefix={folder}/",
        str(corpus),
    ]
    return run(command, seconds + 120).strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the C++ core under sanitizers.")
    parser.add_argument("--minutes", type=float, default=0, help="how long; default: the short form")
    parser.add_argument("--folder", type=Path, default=Path("build/sanitize"))
    given = parser.parse_args()
    part = given.minutes * 60 / 3
    print("shards, ASan and UBSan:", fuzz(given.folder, part), flush=True)
    print("sampler, TSan:", race(given.folder, THREADS, part), flush=True)
    print("sampler, ASan and UBSan:", race(given.folder, MEMORY, part), flush=True)
    clang = shutil.which("clang++")
    if given.minutes and clang:
        print("shards, libFuzzer:", lib_fuzzer(given.folder, clang, part))
    elif given.minutes:
        print("shards, libFuzzer: not run, there is no clang++")


if __name__ == "__main__":
    main()
