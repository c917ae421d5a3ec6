"""The lineage: what may be added, who descends from whom, what it cost, how it is shown and kept."""

from __future__ import annotations

import json

import pytest

from velopath.errors import ConfigError
from velopath.lineage import Cost, Lineage, Version, ledger, render
from velopath.schedule import LrPath

MAIN = LrPath.main(3e-3, 50)


def demo() -> Lineage:
    """The demo's run: T = 700, alpha 0.6."""
    v1 = Version(
        "v1",
        "main",
        280,
        420,
        "slice-1",
        tokens=430_080,
        evaluation_tokens=8_192,
        path=MAIN.branch(280, 420, floor=3e-4),
        heldout_loss={"code": 2.5, "prose": 3.5},
        checkpoint="c0ffee",
        notes={"hardware": "two cores"},
    )
    v2 = Version("v2", "main@980", 980, 420, "slice-2", tokens=430_080)
    return (
        Lineage()
        .spend("base", Cost(base_steps=500, tokens=512_000))
        .spend("proxy", Cost(proxy_steps=350, tokens=358_400, evaluation_tokens=24_576))
        .with_main(280, "slice-1", tokens=286_720, checkpoint="beef")
        .add(v1)
        .with_main(700, "slice-1", tokens=430_080)
        .with_main(980, "slice-2", tokens=286_720)
        .add(v2)
        .with_export("v1", "exports/v1")
    )


def test_tree() -> None:
    lineage = demo()
    assert [v.name for v in lineage.versions] == ["v1", "v2"]
    assert [(n.name, n.parent, n.branch_step, n.steps) for n in lineage.main] == [
        ("main@280", None, 0, 280),
        ("main@700", "main@280", 280, 420),
        ("main@980", "main@700", 700, 280),
    ]
    v1 = lineage.find("v1")
    assert (v1.parent, v1.step, v1.export, v1.checkpoint) == ("main@280", 700, "exports/v1", "c0ffee")
    assert [n.name for n in lineage.ancestors("v2")] == ["main@980", "main@700", "main@280"]
    assert [n.name for n in lineage.ancestors("v1")] == ["main@280"]
    assert lineage.ancestors("main@280") == ()
    assert lineage.slices_read("v1") == ("slice-1",)
    assert lineage.slices_read("v2") == ("slice-1", "slice-2")


def test_ledger_by_hand() -> None:
    assert ledger(demo()) == {
        "main_steps": 980,  # 280 + 420 + 280
        "branch_steps": 840,  # 420 + 420
        "proxy_steps": 350,
        "base_steps": 500,
        # 286720 + 430080 + 286720 on the main path, 2 * 430080 on branches, 512000 + 358400 beside it
        "tokens": 2_734_080,
        "evaluation_tokens": 32_768,  # 8192 + 24576
    }
    assert ledger(Lineage()) == dict.fromkeys(ledger(demo()), 0)


def test_costs_add() -> None:
    assert Cost(main_steps=1, seconds=0.5) + Cost(main_steps=2, tokens=3) == Cost(3, tokens=3, seconds=0.5)
    with pytest.raises(ConfigError, match="proxy_steps is -1; expected 0 or more"):
        Cost(proxy_steps=-1)


def test_json_and_events() -> None:
    lineage = demo()
    value = json.loads(json.dumps(lineage.to_json()))
    assert Lineage.from_json(value) == lineage
    events = [
        {"event": "main", **Version("main@10", None, 0, 10, "a").to_json()},
        {"event": "started", "host": "x"},
        {"event": "version", **Version("v1", "main", 10, 5, "a").to_json()},
        {"event": "export", "name": "v1", "export": "exports/v1"},
        {"event": "spend", "what": "proxy", "cost": {"proxy_steps": 3}},
    ]
    built = Lineage.from_events(events)
    assert built.find("v1").export == "exports/v1"
    assert built.find("v1").parent == "main@10"
    assert built.cost == Cost(main_steps=10, branch_steps=5, proxy_steps=3)


def test_main_checkpoints_are_added_once_and_in_order() -> None:
    lineage = demo()
    assert lineage.with_main(700, "slice-1") is lineage
    with pytest.raises(ConfigError, match="main checkpoint at step 0; expected 1 or more"):
        Lineage().with_main(0, "slice-1")


def test_a_later_checkpoint_within_an_edge_cuts_it() -> None:
    lineage = demo().with_main(300, "slice-1")
    # main@280 -> main@700 were 420 steps and 430,080 tokens: 20 steps are 20,480 of them
    first, rest = lineage.find("main@300"), lineage.find("main@700")
    assert (first.parent, first.branch_step, first.steps, first.tokens) == ("main@280", 280, 20, 20_480)
    assert (rest.parent, rest.branch_step, rest.steps, rest.tokens) == ("main@300", 300, 400, 409_600)
    assert ledger(lineage) == ledger(demo())
    assert [n.step for n in lineage.main] == [280, 300, 700, 980]
    assert [n.name for n in lineage.ancestors("v2")] == ["main@980", "main@700", "main@300", "main@280"]
    cut = lineage.add(Version("v0", "main", 300, 5, "slice-1"))
    assert cut.find("v0").parent == "main@300"
    assert Lineage.from_json(json.loads(json.dumps(cut.to_json()))) == cut


def version(name: str = "v3", parent: str | None = "main", at: int = 980, steps: int = 10) -> Version:
    return Version(name, parent, at, steps, "slice-2")


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (version("v1"), "version 'v1' exists already"),
        (version("main"), "version name 'main' is reserved"),
        (version("main@5"), "version name 'main@5' is reserved"),
        (version(""), "reserved or empty"),
        (version(steps=0), "version 'v3' has 0 steps; expected 1 or more"),
        (version(at=979), "at step 979, where the main path has no checkpoint; it has some at 280, 700, 980"),
        (version(parent=None, at=0), "branches at step 0, where the main path has no checkpoint"),
        (
            version(parent="main@4"),
            "no version or main checkpoint 'main@4'; there are main@280, v1, main@700",
        ),
        (version(parent="main@700"), "branches at step 980 from 'main@700', a main checkpoint at step 700"),
        (version(parent="v1", at=700), "from 'v1', a version at step 700; expected a main checkpoint"),
        (Version("main@990", "main@980", 980, 10, "a", "main"), "is a main checkpoint; add it by with_main"),
    ],
)
def test_refusals(added: Version, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        demo().add(added)


def test_unknown_names_and_malformed_json() -> None:
    with pytest.raises(ConfigError, match="no version or main checkpoint 'v9'"):
        demo().ancestors("v9")
    with pytest.raises(ConfigError, match="no version or main checkpoint 'x'; there are none yet"):
        Lineage().with_export("x", "y")
    with pytest.raises(ConfigError, match="lineage has version 2; expected 1"):
        Lineage.from_json({"version": 2})
    with pytest.raises(ConfigError, match="malformed lineage event 'version'.*missing"):
        Lineage.from_events([{"event": "version", "name": "v1"}])
    with pytest.raises(ConfigError, match="malformed lineage event 'export': 'name'"):
        Lineage.from_events([{"event": "export"}])


def test_render() -> None:
    assert render(demo()).splitlines() == [
        "  * v2        steps 980-1,400 (420)  slice-2  430,080 tokens",
        " /",
        "*   main@980  steps 700-980 (280)  slice-2  286,720 tokens",
        "*   main@700  steps 280-700 (420)  slice-1  430,080 tokens",
        "| * v1        steps 280-700 (420)  slice-1  430,080 tokens  3.000 nats  cosine to 0.0003  -> exports/v1",
        "|/",
        "*   main@280  steps 0-280 (280)  slice-1  286,720 tokens",
        "    base: 500 base steps, 512,000 tokens",
        "    proxy: 350 proxy steps, 358,400 tokens, 24,576 tokens evaluated",
    ]
    assert render(Lineage()) == "nothing trained yet"
