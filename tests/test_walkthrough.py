"""The year of docs/walkthrough.sh, line by line, on small data; and that the page shows what the script runs."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from commands import velopath
from conftest import write_data
from small_run import write_config
from velopath.runfolder import RunFolder
from velopath.runlineage import read_lineage

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = (DOCS / "walkthrough.sh").read_text()
STEPS = 40


def quarters(root: Path) -> Path:
    """q1 and q2: code and prose; q3: maths alone; q4: all three."""
    for number, names in enumerate(
        (("code", "prose"), ("code", "prose"), ("maths",), ("code", "prose", "maths")), 1
    ):
        folder = write_data(root / f"q{number}", ("code", "prose", "maths"), documents=60 + 10 * number)
        table = json.loads((folder / "domains.json").read_text())
        for left_out in set(table["domains"]) - set(names):
            del table["domains"][left_out]
            for part in ("train", "heldout"):
                shutil.rmtree(folder / part / left_out)
        (folder / "domains.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The run folder after the year, and what each command printed."""
    root = tmp_path_factory.mktemp("year")
    data = quarters(root / "data")
    slices = {"q1": {"root": str(data / "q1"), "steps": STEPS}}
    config = write_config(
        root / "year.yaml",
        data,
        data__slices=slices,
        control__controller="static",
        train__checkpoint_every=20,
    )
    values = {"DATA": str(data), "CONFIG": str(config), "RUN": str(root / "run"), "STEPS": str(STEPS)}
    values["BORDER"] = str(2 * STEPS)
    printed = {}
    for line in SCRIPT.splitlines():
        if not line.startswith(("velopath ", "! velopath ")):
            continue
        fails, words = line.startswith("!"), line.removeprefix("! ")
        for name, value in values.items():
            words = words.replace(f"${name}", value)
        done = velopath(*shlex.split(words)[1:])
        assert (done.code != 0) == fails, (line, done.out, done.err)
        printed[line] = done.out
    return root / "run", printed


def test_the_year_ends_with_four_versions_and_a_record_of_what_happened(
    year: tuple[Path, dict[str, str]],
) -> None:
    run, printed = year
    lineage = read_lineage(RunFolder(run))
    assert [(v.name, v.slice) for v in lineage.versions] == [
        ("v1", "q1"),
        ("v2", "q2"),
        ("v3", "q3-replayed"),
        ("v4", "q4"),
    ]
    assert [n.step for n in lineage.rolled_back] == [2 * STEPS + 16]
    assert set(lineage.find("v4").heldout_loss) == {"code", "prose", "maths"}
    health = printed['! velopath health "$RUN"']
    assert "from_best" in health and ("warn" in health or "stop" in health)
    before, after = (
        next(
            r["loss"]
            for r in RunFolder(run).records()
            if r["kind"] == "eval" and r["step"] == 96 and r["slice"] == s
        )
        for s in ("q3", "q3-replayed")
    )
    assert all(after[name] < before[name] - 0.1 for name in ("code", "prose"))
    assert "of PTFS" in printed['velopath plan --actual "$RUN"']
    assert "flowchart" in printed['velopath log "$RUN" --mermaid']


def test_the_page_shows_the_scripts_commands() -> None:
    page = (DOCS / "walkthrough.md").read_text()
    shown = [
        line.split("  #")[0].strip()
        for block in page.split("```bash\n")[1:]
        for line in block.split("```")[0].splitlines()
        if line.strip()
    ]
    ran = [line for line in SCRIPT.splitlines() if "velopath " in line and not line.startswith("#")]
    plain = [line.replace('"', "") for line in ran]
    for line in shown:
        assert line in plain, line
    assert [line for line in plain if line not in shown] == []
