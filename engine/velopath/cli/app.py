"""The command line: registers the commands and turns errors into exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer

from velopath.cli.branch import branch
from velopath.cli.data import app as data
from velopath.cli.demo import demo
from velopath.cli.diff import diff
from velopath.cli.evaluate import evaluate
from velopath.cli.explain import explain
from velopath.cli.export import export
from velopath.cli.forecast import forecast
from velopath.cli.gc import gc
from velopath.cli.health import health
from velopath.cli.inspect import inspect
from velopath.cli.log import log
from velopath.cli.override import override
from velopath.cli.pack import pack
from velopath.cli.plan import plan
from velopath.cli.prepare import prepare
from velopath.cli.replay import replay
from velopath.cli.report import report
from velopath.cli.rollback import rollback
from velopath.cli.run import run
from velopath.cli.targets import targets
from velopath.cli.train import train
from velopath.cli.verify import verify
from velopath.cli.whatif import whatif
from velopath.errors import VelopathError

EPILOG = (
    "Exit codes: 0 done, 2 bad configuration or argument, 3 bad data, 4 stopped with a checkpoint, "
    "5 numerical failure, 6 stopped by an alarm with a checkpoint, 1 anything else."
)
app = typer.Typer(
    name="velopath",
    help="Continual pre-training: Velocitune domain weights on learning-rate paths.",
    epilog=EPILOG,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "inspect": inspect,
    "pack": pack,
    "targets": targets,
    "plan": plan,
    "train": train,
    "run": run,
    "branch": branch,
    "eval": evaluate,
    "log": log,
    "diff": diff,
    "health": health,
    "forecast": forecast,
    "override": override,
    "rollback": rollback,
    "gc": gc,
    "explain": explain,
    "whatif": whatif,
    "verify": verify,
    "replay": replay,
    "report": report,
    "export": export,
    "demo": demo,
}
for name, command in COMMANDS.items():
    app.command(name, epilog=EPILOG)(command)
app.add_typer(data, name="data", epilog=EPILOG)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from velopath import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of `velopath`. A velopath error is printed in one block and ends with its exit code."""
    try:
        app()
    except VelopathError as error:
        print(f"velopath: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (OSError, MemoryError) as error:
        print(f"velopath: {type(error).__name__}: {error or 'out of memory'}", file=sys.stderr)
        sys.exit(1)
