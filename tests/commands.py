"""Real `velopath` processes at the price of a fork: a server that has imported torch, and its client.

`velopath("train", ...)` runs a command to its end; `start` gives a process to be signalled or killed. One thread per
process, so that bits agree wherever a run was made.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit code (negative: the signal that killed it) and what it wrote."""

    code: int
    out: str
    err: str


class Process:
    """A running command."""

    def __init__(self, pid: int, out: Path, err: Path) -> None:
        self.pid, self._out, self._err = pid, out, err

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return bool(_ask({"poll": self.pid})["code"] is None)

    def wait(self, seconds: float = 60.0) -> Finished:
        deadline = time.monotonic() + seconds
        while (code := _ask({"poll": self.pid})["code"]) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"still running after {seconds} s; it wrote {self._err.read_text()!r}")
            time.sleep(0.01)
        return Finished(code, self._out.read_text(), self._err.read_text())

    def until(self, reached: Callable[[], bool], seconds: float = 60.0) -> None:
        """Wait until `reached()`; an error where the process ends before."""
        deadline = time.monotonic() + seconds
        while not reached():
            if not self.running:
                raise RuntimeError(f"ended too early: {self.wait()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"not there after {seconds} s")
            time.sleep(0.02)


def start(
    *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, code: str | None = None
) -> Process:
    """`velopath ARGUMENTS` (or Python `code`) in a process of its own, with `env` added to the environment."""
    handles = [tempfile.mkstemp(dir=_scratch()) for _ in range(2)]
    for handle, _ in handles:
        os.close(handle)
    out, err = (name for _, name in handles)
    request = {"arguments": [str(a) for a in arguments], "cwd": str(cwd or _scratch()), "env": env or {}}
    request["code"] = code
    return Process(_ask(request | {"out": out, "err": err})["pid"], Path(out), Path(err))


def start_ranks(world: int, *arguments: object, code: str | None = None) -> list[Process]:
    """`velopath ARGUMENTS` (or Python `code`) as `torchrun` would start it, on `world` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(*arguments, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, code=code)
        for rank in range(world)
    ]


def velopath(*arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Finished:
    """Run `velopath ARGUMENTS` to its end."""
    return start(*arguments, cwd=cwd, env=env).wait()


_server: subprocess.Popen[str] | None = None
_folder: tempfile.TemporaryDirectory[str] | None = None


def _scratch() -> Path:
    global _folder
    if _folder is None:
        _folder = tempfile.TemporaryDirectory()
    return Path(_folder.name)


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    global _server
    if _server is None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        _server = subprocess.Popen(
            [sys.executable, __file__],
            env=env | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(_end)
    assert _server.stdin is not None and _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    answer: dict[str, Any] = json.loads(_server.stdout.readline())
    return answer


def _end() -> None:
    if _server is not None and _server.stdin is not None:
        _server.stdin.close()
        _server.wait()
    if _folder is not None:
        _folder.cleanup()


def _serve() -> None:
    """Fork a child per request. Only imports happened here, no torch call, so no thread pool is forked."""
    import torch._dynamo  # noqa: F401  AdamW's first step imports it

    import velopath.cli
    import velopath.cli.dry_run
    import velopath.cli.progress
    import velopath.export
    import velopath.proxy
    import velopath.report
    import velopath.run
    import velopath.segments  # noqa: F401

    codes: dict[int, int] = {}
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer: dict[str, Any] = {"code": codes.get(pid)}
        else:
            answer = {"pid": os.fork()}
            if answer["pid"] == 0:
                answers.close()
                _become(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _become(request: dict[str, Any]) -> None:
    """The child: streams, folder and environment of the request, then the command's own entry point."""
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["out"], os.O_WRONLY),
        (2, request["err"], os.O_WRONLY),
    ):
        os.dup2(os.open(name, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, m) for n, m in ((0, "r"), (1, "w"), (2, "w")))
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = ["velopath", *request["arguments"]]
    from velopath.cli import main

    try:
        if request["code"] is not None:
            exec(request["code"], {})
        else:
            main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
