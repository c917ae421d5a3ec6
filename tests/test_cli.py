"""The commands: help without torch, exit codes, errors in one block, and what each prints about a finished run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import velopath
from conftest import write_data
from small_corpus import make_codec, make_corpus
from small_run import in_force, newest, write_config
from velopath.cli.app import COMMANDS
from velopath.model import Decoder, preset


@pytest.fixture(scope="module")
def config_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "small.yaml", data)


@pytest.fixture(scope="module")
def finished(config_file: Path) -> Path:
    """A run with both versions."""
    folder = config_file.parent / "run"
    done = velopath("train", config_file, "--run", folder, "--versions")
    assert done.code == 0, done.err
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# -- start-up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("plan", "--steps", "100")])
def test_starts_within_a_second(arguments: tuple[str, ...]) -> None:
    """CPU time of the whole process, which other work on the machine does not lengthen."""
    process = subprocess.Popen([sys.executable, "-m", "velopath", *arguments], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 1.0


WITHOUT_TORCH = """
import sys, json
from velopath.cli import main
for arguments in json.load(sys.stdin):
    sys.argv = ["velopath", *arguments]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), (arguments, end.code)
    assert not {"torch", "transformers"} & set(sys.modules), f"{arguments} imports torch"
"""


def test_help_and_looking_need_no_torch(finished: Path, tmp_path: Path) -> None:
    """Every command's help says its exit codes; plan, log, report, inspect and prepare run without torch."""
    corpus, codec = make_corpus(tmp_path), make_codec(tmp_path)
    commands = [[name, "--help"] for name in COMMANDS]
    commands += [
        ["plan"],
        ["plan", str(finished / "config.yaml"), "--json"],
        ["log", str(finished)],
        ["explain", str(finished)],
        ["explain", str(finished), "--alarms"],
        ["whatif", str(finished), "--controller", "odm"],
        ["report", str(finished)],
        [
            "prepare",
            "-d",
            f"a={corpus['a']}",
            "--out",
            str(tmp_path / "made"),
            "--tokenizer",
            str(codec),
        ],
        ["inspect", str(tmp_path / "made"), "--verify"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input=json.dumps(commands), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(COMMANDS)
    assert done.stdout.count("Exit codes: 0 done, 2 bad configuration") == len(COMMANDS)


def test_version_and_bare_name() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", velopath("--version").out)
    bare = velopath()
    assert "Usage: velopath" in bare.out + bare.err and "Commands" in bare.out + bare.err


# -- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("train", "nope.yaml"), 2, "ConfigError: no such config file: nope.yaml"),
        (
            ("train", "CONFIG", "train.rows=0"),
            2,
            "small.yaml: train.rows: Input should be greater than 0 (given: 0)",
        ),
        (("train", "CONFIG", "rows"), 2, "override 'rows' is not of the form a.b=c"),
        (("train", "CONFIG", "--run", "NEW", "--until", "99"), 2, "step 99 lies beyond the last slice"),
        (("train", "CONFIG", "--run", "RUN", "seed=4"), 2, "  seed: 0 -> 4"),
        (("train", "CONFIG", "data.slices.one.root=/nowhere", "--run", "NEW"), 3, "/nowhere: no domains"),
        (("train", "CONFIG", "data.slices.one.root=/nowhere", "--dry-run"), 3, "/nowhere: no domains"),
        (("train", "CONFIG", "model.preset=huge", "--dry-run"), 2, "unknown model preset 'huge'"),
        (
            ("train", "CONFIG", "path.branch_share=0", "--dry-run"),
            2,
            "path.branch_share: Input should be greater",
        ),
        (("targets", "CONFIG", "proxy.steps=4", "--run", "NEW"), 2, "leave no room for 5 points"),
        (("branch", "RUN", "v9"), 2, "the plan has no version 'v9' (it names v1, v2); give --at STEP"),
        (("branch", "RUN", "v9", "--at", "20"), 2, "no main checkpoint at step 20"),
        (("branch", "RUN", "v9", "--at", "16", "--shape", "round"), 2, "round"),
        (("branch", "nowhere", "v1"), 3, "nowhere: no such run folder"),
        (("eval", "RUN", "v9"), 2, "no model 'v9' in"),
        (("export", "RUN", "v9"), 2, "no model 'v9' in"),
        (("log", "nowhere"), 3, "nowhere: no such run folder"),
        (("log", "RUN", "--json", "--mermaid"), 2, "--json and --mermaid were both given"),
        (("report", "nowhere"), 3, "nowhere: no such run folder"),
        (("inspect", "nowhere"), 3, "nowhere"),
        (("plan", "--alpha", "1.5"), 2, "branch_share is 1.5"),
        (("plan", "--steps", "0"), 2, "slice 'slice-1' has 0 steps"),
        (("demo", "--out", "RUN", "--fresh"), 2, "is not a demo's folder; --fresh deletes only those"),
    ],
)
def test_an_error_is_one_block_and_its_exit_code(
    config_file: Path, finished: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    before = newest(finished), in_force(finished)
    places = {"CONFIG": config_file, "RUN": finished, "NEW": tmp_path / "new"}
    done = velopath(*(places.get(a, a) for a in arguments), cwd=tmp_path)
    assert (done.code, message in done.err) == (code, True), done
    assert done.err.lstrip().startswith("velopath: ") and "Traceback" not in done.err + done.out
    assert (newest(finished), in_force(finished)) == before


@pytest.mark.parametrize(
    "arguments", [("nothing",), ("train",), ("plan", "--steps", "many"), ("eval", "r", "v1", "--tokens", "0")]
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = velopath(*arguments)
    assert done.code == 2 and "Usage: velopath" in done.err and "Traceback" not in done.err


def test_damaged_data_are_exit_code_3(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", documents=60)
    path = write_config(tmp_path / "run.yaml", data)
    shard = next((data / "train" / "prose").glob("shard.*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    env = {"VELOPATH_CACHE": str(tmp_path / "cache")}
    for command in (("train", path, "--run", tmp_path / "run"), ("inspect", data, "--verify")):
        done = velopath(*command, env=env)
        assert done.code == 3, done
        assert str(shard.name) in done.err and "Traceback" not in done.err


# -- what the commands print ------------------------------------------------------------------------------------


def test_plan_prints_the_published_shares() -> None:
    done = velopath("plan", "--versions", "4", "--steps", "1000", "--alpha", "0.6")
    assert done.code == 0
    last = [line for line in done.out.splitlines() if "v4" in line][0]
    assert "58.0%" in last and "145.0%" in last and "10,000" in last and "5,800" in last


def test_plan_of_a_config_as_json_and_picture(config_file: Path, tmp_path: Path) -> None:
    done = velopath("plan", config_file, "path.branch_share=0.5", "--json", "--png", tmp_path / "plan.png")
    assert done.code == 0, done.err
    assert json.loads(done.out)["costs"]["totals"] == {"ptfs": 120, "cpt": 80, "switching": 100}
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_a_dry_run_shows_all_and_writes_nothing(config_file: Path, finished: Path, tmp_path: Path) -> None:
    before = tree(tmp_path), tree(config_file.parent)
    done = velopath("train", config_file, "path.shape=knee", "--dry-run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tree(tmp_path), tree(config_file.parent)) == before
    for text in (
        "shape: knee",
        "row_tokens: 32",
        "run folder runs/small",
        "one: initial mixture",
        "two: initial",
    ):
        assert text in done.out
    code = [line for line in done.out.splitlines() if "code" in line and "│" in line]
    assert "0.5000" in code[0] and "8,320" in code[0]  # asked share and tokens of slice one
    assert "v1" in done.out and "16: 1.00e-02" in done.out
    shape = preset("tiny", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                   num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    count = sum(p.numel() for p in Decoder(shape, seed=0).parameters())
    assert f"{count / 1e6:,.2f} M" in done.out
    again = velopath("train", config_file, "--run", finished, "--dry-run")
    assert "(exists: train resumes it)" in again.out.replace("\n", " ")


def test_train_prints_progress_in_lines_or_as_bars(config_file: Path, tmp_path: Path) -> None:
    lines = velopath("train", config_file, "--run", tmp_path / "lines", "--until", "16")
    assert re.search(
        r"main  16/16  \d\.\d+ nats  [\d.]+k tokens/s \([\d.]+ GFLOP/s\)  rate 1.00e-02  code \d+ prose \d+",
        lines.out,
    )
    bars = velopath("train", config_file, "--run", tmp_path / "bars", "--versions", env={"FORCE_COLOR": "1"})
    assert bars.code == 0, bars.err
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", bars.out)
    assert "main" in plain and "v2" in plain and "80/80" in plain and "nats" in plain
    assert "cut: mean held-out loss" in plain


def test_eval_compares_models(finished: Path) -> None:
    done = velopath("eval", finished, "v1", "v2", "main@56")
    assert done.code == 0, done.err
    for text in ("v1", "v2", "main@56", "code", "prose", "tables", "mean", "worst", " ± "):
        assert text in done.out
    found = json.loads(velopath("eval", finished, "v1", finished / "exports" / "v1", "--json").out)
    one, two = found.values()
    assert one == two and set(one) == {"code", "prose", "tables"}
    assert one == in_force(finished, "version", "v1")[-1]["loss"]
    worse = json.loads(velopath("eval", finished, "main@16", "v1", "--json").out)
    assert sum(worse["main@16"].values()) > sum(worse["v1"].values())


def test_export_prints_the_folder(finished: Path, tmp_path: Path) -> None:
    done = velopath("export", finished, "main@56", "--out", tmp_path / "trunk")
    assert (done.code, done.out) == (0, f"{tmp_path / 'trunk'}\n")
    assert {p.name for p in (tmp_path / "trunk").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "velopath.json",
    }
    assert velopath("export", finished, "main@56").out == f"{finished / 'exports' / 'main-56'}\n"


def test_branch_cuts_and_exports(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert velopath("train", config_file, "--run", folder, "--until", "21").code == 0
    done = velopath("branch", folder, "early", "--at", "16", "--steps", "6", "--shape", "linear")
    assert done.code == 0, done.err
    assert str(folder / "exports" / "early") in done.out.replace("\n", "")
    kept = velopath("branch", folder, "late", "--at", "21", "--no-export")
    assert kept.code == 0, kept.err
    assert {p.name for p in (folder / "exports").iterdir()} == {"early"}
    again = velopath("branch", folder, "early", "--at", "16")
    assert again.code == 0 and "is cut already" in again.out
    log = velopath("log", folder).out
    assert "early" in log and "late" in log and "main@21" in log


def test_log_shows_the_lineage(finished: Path) -> None:
    text = velopath("log", finished).out
    for word in ("main@16", "main@40", "main@56", "v1", "v2"):
        assert word in text
    nodes = json.loads(velopath("log", finished, "--json").out)
    assert "v1" in json.dumps(nodes)
    mermaid = velopath("log", finished, "--mermaid").out
    assert mermaid.startswith("flowchart LR") and mermaid.count("-->") == 5


def test_report_writes_page_summary_and_picture(finished: Path, tmp_path: Path) -> None:
    done = velopath("report", finished, "--png", tmp_path / "overview.png")
    assert done.code == 0, done.err
    assert done.out.split() == [
        str(finished / "report.html"),
        str(finished / "summary.json"),
        str(tmp_path / "overview.png"),
    ]
    summary = json.loads((finished / "summary.json").read_text())
    assert [v["name"] for v in summary["versions"]] == ["v1", "v2"]
    assert [w["step"] for w in summary["weights"]][:3] == [0, 5, 10]
    assert (tmp_path / "overview.png").read_bytes()[:4] == b"\x89PNG"


def test_inspect_shows_prepared_text(tmp_path: Path) -> None:
    corpus, codec = make_corpus(tmp_path), make_codec(tmp_path)
    out = tmp_path / "data"
    made = velopath(
        "prepare", "-d", f"a={corpus['a']}", "-d", f"b={corpus['b']}", "--out", out, "--tokenizer", codec
    )
    assert made.code == 0, made.err
    done = velopath("inspect", out, "--verify", "--samples", "1")
    assert done.code == 0, done.err
    found = json.loads(velopath("inspect", out, "--json").out)
    assert json.loads((out / "domains.json").read_text())["domains"].keys() == {"a", "b"}
    assert "400 entries" in done.out and "held out" in done.out and found


def test_targets_prints_the_laws(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = velopath("targets", config_file, "--run", folder, "proxy.steps=20", "proxy.points=4")
    assert done.code == 0, done.err
    assert "Target losses" in done.out and "/ D^" in done.out and "proxy: 20 steps, 2,560 tokens" in done.out
    again = velopath("targets", config_file, "--run", folder, "proxy.steps=20", "proxy.points=4")
    assert again.code == 0 and "--force fits it anew" in again.out


def test_help_names_an_extra_in_full() -> None:
    """Square brackets are markup to the help's renderer, which drops what it does not know."""
    assert "velopath[corpora]" in velopath("prepare", "--help").out.replace("\n", " ")
