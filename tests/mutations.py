"""Whether the tests notice: each mechanism of docs/reliability.md is taken out, and the row's test must fail.

    python tests/mutations.py [ROW ...] [--results DIR]

Copies the project to a temporary folder, checks that each test passes there, applies one small patch, runs the test
again and puts the file back. All of it takes about 15 minutes on two idle cores; the rows of the C++ core (marked
C++), which build the extension anew, 2 of them each. `py` leaves those out. Exit code 1 where a test passes without its
mechanism.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = (
    "engine",
    "csrc",
    "tests",
    "benchmarks",
    "docs",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "constraints.txt",
)


@dataclass(frozen=True)
class Mutation:
    """In `file`, `old` becomes `new`; `test` must then fail. `mechanism` says what is gone."""

    row: str
    mechanism: str
    file: str
    old: str
    new: str
    test: str


def engine(row: str, mechanism: str, file: str, old: str, new: str, test: str) -> Mutation:
    return Mutation(row, mechanism, f"engine/velopath/{file}", old, new, f"tests/{test}")


MUTATIONS = [
    engine(
        "R1", "a resume restores the random generators", "checkpoint.py",
        'torch.set_rng_state(generators["cpu"])', "pass", "test_checkpoint.py::test_a_resumed_run_is_bit_identical",
    ),
    engine(
        "R2", "a checkpoint is staged beside its name and renamed when whole", "tensor_files.py",
        'stage = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")', "stage = folder",
        "test_checkpoint.py::test_a_save_killed_at_any_stage_leaves_a_loadable_one",
    ),
    engine(
        "R3", "the order is keyed by rows of a step on all ranks, not by a rank's", "stream_state.py",
        "return self.rows * self.world", "return self.rows",
        "test_sampler_state.py::test_a_run_through_several_world_sizes_reads_the_same",
    ),
    engine(
        "R3", "ranks compare what they read before a save", "loop.py",
        "differs = self.dist.broadcast_json(session.stream_hash) != session.stream_hash", "differs = False",
        "test_ddp.py::test_ranks_that_read_by_other_weights_save_nothing",
    ),
    engine(
        "R4", "a push is on record before it has an effect", "stream.py",
        "                self._core.abort_push()\n                raise", "                pass",
        "test_audit.py::test_a_push_that_cannot_be_recorded_has_no_effect",
    ),
    engine(
        "R4", "a state that is loaded is recorded as a rewind", "stream.py",
        "self._audit.rewind(step=step, weights_id=mixes[-1].id, weights=mixes[0])", "pass",
        "test_audit.py::test_the_sampler_records_pushes_and_rewinds",
    ),
    engine(
        "R4", "records are chained by hashes", "audit.py",
        'if record["previous"] != previous:', "if False:",
        "test_audit.py::test_a_record_written_anew_with_its_own_hash_is_found",
    ),
    Mutation(
        "R5", "C++: what was asked less what was given is carried over from row to row", "csrc/draw.h",
        "if (best < n) error[best] -= one;", "if (best < n) error.assign(n, 0);",
        "tests/test_sampler.py::test_cumulative_rows_stay_within_one_of_the_shares",
    ),
    engine(
        "R6", "hashes are compared", "mds/format.py",
        "if found != expected.lower():", "if False:",
        "test_quarantine.py::test_bad_shards_are_refused_or_left_out",
    ),
    engine(
        "R6", "every document is decoded before a shard is taken", "stream_quarantine.py",
        "decode(shard_of(entry, bytes_dtype, path))", "pass",
        "test_quarantine.py::test_bad_shards_are_refused_or_left_out",
    ),
    engine(
        "R6", "a remote shard is believed only where it was decoded and has a hash", "shard_journal.py",
        "if not decoded or (flags & _DECODED and hashed(number)):", "if True:",
        "test_remote_quarantine.py::test_shards_without_a_hash_are_read_at_every_start",
    ),
    engine(
        "R6", "a remote shard that went bad is looked at again", "stream_feed.py",
        "self._doubt[shard[0]](shard[1])", "pass",
        "test_remote_quarantine.py::test_what_goes_bad_later_is_an_error_and_left_out_by_the_next_start",
    ),
    engine(
        "R6", "a network that fails says nothing about a shard", "stream_remote.py",
        "if isinstance(error, (FetchError, WriteError)) and not missing:", "if False:",
        "test_remote_quarantine.py::test_a_network_or_a_store_that_refuses_says_nothing_about_a_shard",
    ),
    engine(
        "R6", "a state knows what was left out", "stream_state.py",
        "        if theirs != here:\n            raise ConfigError(\n                f\"the state was made",
        "        if False:\n            raise ConfigError(\n                f\"the state was made",
        "test_quarantine.py::test_a_resume_must_leave_out_the_same",
    ),
    engine(
        "R7", "a line that does not fit is taken back", "runfolder.py",
        "            os.ftruncate(handle, size)\n        raise write_error",
        "            pass\n        raise write_error",
        "test_disk.py::test_a_line_is_appended_whole_or_not_at_all",
    ),
    engine(
        "R7", "a file is written beside its name and renamed when whole", "durable.py",
        'temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")', "temporary = path",
        "test_cache.py::test_durable_write_keeps_the_old_file",
    ),
    engine(
        "R7", "what a disk refuses is named", "durable.py",
        "if isinstance(error, OSError) and _of_writing(error, temporary):", "if False:",
        "test_disk.py::test_inflating_leaves_no_half_shard",
    ),
    Mutation(
        "R9", "C++: next() notices that no thread finishes a step", "csrc/sampler.cpp",
        "if (waited > settings_.stall_seconds)", "if (waited > 1e9)",
        "tests/test_sampler.py::test_a_stall_is_an_error_and_no_step_is_lost",
    ),
    engine(
        "R9", "a fetch that failed is tried again while the steps go on", "stream_feed.py",
        "            del self._failed[shard]\n", "            return False\n",
        "test_remote_feed.py::test_a_network_that_was_down_ends_no_run",
    ),
    engine(
        "R9", "Python waits for no thread that fetches", "remote_threads.py",
        "daemon=True", "daemon=False", "test_remote_exit.py::test_leaving_python_waits_for_no_fetch",
    ),
    engine(
        "R9", "a read that is stopped is cancelled", "remote_loop.py",
        "            if stop.is_set():", "            if False:",
        "test_remote_exit.py::test_leaving_python_waits_for_no_fetch",
    ),
    engine(
        "R9", "a cache folder that is removed is made again", "cache.py",
        "if last or not _emptied(error):", "if True:",
        "test_remote_feed.py::test_a_folder_removed_in_the_midst_of_a_fetch",
    ),
    engine(
        "R11", "the lock of a run folder", "runfolder.py",
        "            self._take(self._handle)\n", "            pass\n",
        "test_runfolder.py::test_the_second_writer_is_refused_by_pid_and_host",
    ),
    engine(
        "R11", "a torn last line is cut off by the next writer", "runfolder.py",
        "    if end != size:\n        os.ftruncate(handle, end)", "    if False:\n        os.ftruncate(handle, end)",
        "test_runfolder.py::test_a_torn_last_line_is_skipped_and_cut_off_by_the_next_append",
    ),
    engine(
        "R12", "a zip bomb is stopped at the size that the index declares", "mds/inflate.py",
        "if total > entry.raw_bytes:", "if False:",
        "test_hostile_memory.py::test_memory_stays_within_twice_what_is_declared",
    ),
    engine(
        "R12", "names stay inside the folder", "mds/__init__.py",
        "if leaves or long or not parts or not name.isprintable():", "if False:",
        "test_hostile_memory.py::test_an_index_names_no_other_place",
    ),
    engine(
        "R12", "links out of the folder are refused", "mds/__init__.py",
        "if os.path.commonpath([real, self.root]) != self.root:", "if False:",
        "test_corruptions.py",
    ),
    engine(
        "R12", "sizes beyond 32 bits are refused", "mds/__init__.py",
        "if raw_bytes > MAX_SHARD_BYTES:", "if False:", "test_corruptions.py",
    ),
    engine(
        "R12", "only the files of a checkpoint are read, with their hashes", "checkpoint.py",
        'if _sha256(folder / name) != entry["sha256"]:', "if False:",
        "test_checkpoint.py::test_tampering_is_detected_and_the_file_named",
    ),
    engine(
        "R13", "a config's depth is bounded before it is built", "config.py",
        "if depth > MAX_YAML_DEPTH:", "if False:", "test_config.py::test_a_malformed_file_is_refused",
    ),
    engine(
        "R17", "a sampler that is closed lets go of its log", "audit.py",
        "            os.close(self._file)\n            self._file = -1",
        "            fcntl.flock(self._file, fcntl.LOCK_UN)\n            self._file = -1",
        "test_soak.py::test_a_soak_holds_nothing_more_at_its_end",
    ),
    engine(
        "R18", "threads assemble ahead of the caller", "stream.py",
        "        threads=threads,\n        prefetch=prefetch,", "        threads=0,\n        prefetch=prefetch,",
        "test_soak.py::test_the_caller_of_next_assembles_nothing",
    ),
    engine(
        "R1", "a resume restores the generators and the model", "run.py",
        "checkpoint.restore(step.decoder, step.optimizer, rng=True)", "pass",
        "test_resume.py::test_a_stopped_run_saves_and_resumes",
    ),
]  # fmt: skip


def run_test(copy: Path, test: str) -> tuple[bool, str]:
    """Whether the test passes in `copy`, and its last lines."""
    env = {**os.environ, "PYTHONPATH": str(copy / "engine"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", test]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return False, "still running after 600 s"
    if done.returncode in (2, 3, 4, 5):
        raise SystemExit(f"{test} could not be run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, (failed or ["passed"])[0][:200]


def build(copy: Path) -> None:
    """The extension of the copy, from its own sources."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--force"]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)


def attempt(copy: Path, mutation: Mutation) -> dict[str, object]:
    """Take the mechanism out, run the test, put it back."""
    path = copy / mutation.file
    sound = path.read_text()
    if sound.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.file} holds {mutation.old!r} {sound.count(mutation.old)} times; expected once"
        )
    start = time.monotonic()
    passes, before = run_test(copy, mutation.test)
    if not passes:
        raise SystemExit(f"{mutation.test} fails with everything in place: {before}")
    path.write_text(sound.replace(mutation.old, mutation.new))
    core = {p: p.read_bytes() for p in (copy / "engine" / "velopath").glob("_core*.so")}
    try:
        if mutation.file.startswith("csrc"):
            build(copy)
        passes, line = run_test(copy, mutation.test)
    finally:
        path.write_text(sound)
        for library, content in core.items():
            library.unlink()  # a new file: the old one may still be mapped
            library.write_bytes(content)
    return asdict(mutation) | {
        "noticed": not passes,
        "saw": line,
        "seconds": round(time.monotonic() - start, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Take mechanisms out and see tests fail.")
    parser.add_argument("rows", nargs="*", help="R1 R6 ...; default all; py: those that need no build")
    parser.add_argument("--results", type=Path, help="folder for a dated JSON and table")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.rows or m.row in given.rows or
              ("py" in given.rows and not m.file.startswith("csrc"))]  # fmt: skip
    found = []
    with tempfile.TemporaryDirectory(prefix="velopath-mutations-") as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(
                    source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
                )
            else:
                shutil.copy(source, copy / name)
        for mutation in chosen:
            found.append(attempt(copy, mutation))
            noticed = "noticed" if found[-1]["noticed"] else "NOT NOTICED"
            print(f"{mutation.row} {mutation.mechanism}: {noticed} ({found[-1]['saw']})", flush=True)
    if given.results is not None:
        write(given.results, found)
    return 0 if all(f["noticed"] for f in found) else 1


def write(folder: Path, found: list[dict[str, object]]) -> None:
    """`DATE-mutations.json` and a table; rows of an earlier run of the same day that were not run now are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    path = folder / f"{date}-mutations.json"
    fresh = {(f["row"], f["mechanism"]) for f in found}
    known = json.loads(path.read_text())["mutations"] if path.exists() else []
    found = [k for k in known if (k["row"], k["mechanism"]) not in fresh] + found
    found.sort(key=lambda f: (int(str(f["row"])[1:]), str(f["mechanism"])))
    path.write_text(
        json.dumps({"date": date, "command": "python tests/mutations.py", "mutations": found}, indent=1)
        + "\n"
    )
    lines = [f"# Mechanisms taken out, {date}", "", "`python tests/mutations.py`", ""]
    lines += ["| row | mechanism taken out | in | test | |", "|---|---|---|---|---|"]
    for f in found:
        outcome = "failed" if f["noticed"] else "**passed**"
        lines.append(f"| {f['row']} | {f['mechanism']} | `{f['file']}` | `{f['test']}` | {outcome} |")
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
