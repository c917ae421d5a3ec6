"""Checkpoints: bit-identical resume, killed and tampered saves, no pickle."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import velopath
from velopath.checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint, step_folder
from velopath.errors import ConfigError, DataError, WriteError
from velopath.model import Decoder, ModelConfig
from velopath.optim import build_optimizer, clip_grad_norm, current_rate, set_rate

CONFIG = ModelConfig(61, 24, 20, 2, 4, 2, max_position_embeddings=32)
FILES = ("model.safetensors", "optimizer.safetensors", "optimizer.json", "rng.safetensors", "state.json")


def fresh(seed: int = 0, **options):
    model = Decoder(CONFIG, seed=seed)
    return model, build_optimizer(model, **options)


def train(model, optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        tokens = torch.randint(
            0, CONFIG.vocab_size, (3, 18)
        )  # from torch's global generator, which is saved too
        logits = model.logits(model(tokens[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        clip_grad_norm(model.parameters(), 0.5)
        set_rate(optimizer, 3e-3 / (step + 1.3))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: a second thread only waits, and a shared machine makes it wait long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(root: Path, step: int, **state) -> Path:
    model, optimizer = fresh()
    train(model, optimizer, range(1))
    save_checkpoint(step_folder(root, step), model=model, optimizer=optimizer, state=state)
    return step_folder(root, step)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """One real save that tests copy: fsync is what costs."""
    return write(tmp_path_factory.mktemp("original"), 1)


@pytest.fixture
def save(original, tmp_path):
    return lambda step: Path(shutil.copytree(original, step_folder(tmp_path, step)))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_a_resumed_run_is_bit_identical(fused, at, tmp_path):
    torch.manual_seed(11)
    model, optimizer = fresh(fused=fused)
    train(model, optimizer, range(at))
    state = {"cursor": {"web": [1, 2**63]}, "share": 0.1 + 0.2, "nothing": None}
    digest = save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state=state)
    rate = current_rate(optimizer)
    losses = train(model, optimizer, range(at, at + 4))

    torch.manual_seed(99)
    again, second = fresh(seed=5, fused=fused)
    train(again, second, range(2))  # in the middle of something else
    weights_before = [id(p) for p in again.parameters()]
    checkpoint = load_checkpoint(tmp_path / "c")
    checkpoint.restore(again, second, rng=True)
    assert checkpoint.state == state and checkpoint.digest == digest
    assert current_rate(second) == rate
    assert [id(p) for p in again.parameters()] == weights_before
    assert train(again, second, range(at, at + 4)) == losses
    for ours, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(second.state[ours][key], value), key


def test_moments_of_one_kernel_serve_the_other(tmp_path):
    torch.manual_seed(0)
    model, optimizer = fresh(fused=False)
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path / "c", model=model, optimizer=optimizer, state={})
    again, second = fresh(seed=1, fused=True)
    load_checkpoint(tmp_path / "c").restore(again, second, rng=True)
    state = torch.get_rng_state()
    losses = train(model, optimizer, range(3, 6))
    torch.set_rng_state(state)
    assert train(again, second, range(3, 6)) == pytest.approx(losses, rel=1e-5)


def test_a_compiled_model_saves_under_its_bare_names(tmp_path):
    model, optimizer = fresh()
    wrapped = torch.compile(model, backend="eager")
    save_checkpoint(tmp_path / "c", model=wrapped, optimizer=optimizer, state={})
    again, second = fresh(seed=1)
    load_checkpoint(tmp_path / "c").restore(torch.compile(again, backend="eager"), second)
    assert torch.equal(again.unembed_weight, model.unembed_weight)


# Every system call that makes a save durable is a place to die at; fork keeps this at one start of torch.
KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_checkpoint import fresh, save_checkpoint, step_folder, latest_checkpoint, load_checkpoint
import velopath.tensor_files as files
root, step = Path(sys.argv[1]), int(sys.argv[2])
model, optimizer = fresh()
save_checkpoint(step_folder(root, 1), model=model, optimizer=optimizer, state={{"save": "first"}})
shutil.copytree(root, str(root) + ".clean")
for stage in range(1, 100):
    shutil.rmtree(root); shutil.copytree(str(root) + ".clean", root)
    child = os.fork()
    if not child:
        calls = 0
        def dying(call):
            def wrapped(*args, **kwargs):
                global calls
                calls += 1
                if calls == stage:
                    os._exit(9)
                return call(*args, **kwargs)
            return wrapped
        for name in ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "chmod"):
            setattr(os, name, dying(getattr(os, name)))
        files.save_file = dying(files.save_file)
        save_checkpoint(step_folder(root, step), model=model, optimizer=optimizer, state={{"save": "second"}})
        os._exit(0)
    done = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    checkpoint = load_checkpoint(latest_checkpoint(root))
    checkpoint.restore(*fresh(1), rng=True)
    print(stage, done, checkpoint.state["save"], flush=True)
    if done:
        left = sorted(p.name for p in root.iterdir())
        print(left)
        break
"""


@pytest.mark.parametrize("step", [2, 1], ids=["new", "replacing"])
def test_a_save_killed_at_any_stage_leaves_a_loadable_one(step):
    script = KILLED.format(tests=str(Path(__file__).parent))
    memory = (
        "/dev/shm" if Path("/dev/shm").is_dir() else None
    )  # fsync is only counted here, and costs nothing there
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        command = [sys.executable, "-c", script, f"{folder}/root", str(step)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    *stages, left = run.stdout.splitlines()
    assert len(stages) > 15
    saves = [line.split()[2] for line in stages]
    assert saves == sorted(saves) and saves[0] == "first" and saves[-1] == "second"  # it switches once
    assert [line.split()[1] for line in stages] == ["False"] * (len(stages) - 1) + ["True"]
    assert left == str(sorted({"step-00000001", f"step-0000000{step}"}))


def test_latest_skips_what_is_not_complete(tmp_path, save):
    assert latest_checkpoint(tmp_path / "none") is None
    assert latest_checkpoint(tmp_path) is None
    good = save(3)
    for step, file in ((4, "manifest.json"), (5, "model.safetensors")):
        (save(step) / file).unlink()
    short = save(6) / "optimizer.safetensors"
    short.write_bytes(short.read_bytes()[:-1])
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / ".tmp-step-00000010-77").mkdir()
    (tmp_path / "step-x").mkdir()
    assert latest_checkpoint(tmp_path) == good


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "link"])
def test_tampering_is_detected_and_the_file_named(name, damage, tmp_path, save):
    path = save(1) / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.rename(tmp_path / "elsewhere")
        if damage == "link":
            path.symlink_to(tmp_path / "elsewhere")
    if name == "manifest.json" and damage == "link":
        load_checkpoint(step_folder(tmp_path, 1))  # may be reached by a link: its content is what counts
        return
    named = r".*" if name == "manifest.json" else re.escape(name)
    with pytest.raises(DataError, match=named):
        load_checkpoint(step_folder(tmp_path, 1))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_with_a_matching_hash_is_not_executed(name, protocol, tmp_path, monkeypatch, save):
    monkeypatch.setenv("BOMB", str(tmp_path / "executed"))
    folder = save(1)
    payload = pickle.dumps(Bomb(), protocol=protocol)
    (folder / name).write_bytes(payload)
    if name != "manifest.json":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=name):
        load_checkpoint(folder).restore(*fresh(), rng=True)
    assert not (tmp_path / "executed").exists()


def test_nothing_in_the_package_unpickles():
    forbidden = re.compile(
        r"torch\.(load|save)\(|\bimport (pickle|dill|cloudpickle)|_object_list\(|allow_pickle=True"
    )
    root = Path(velopath.__file__).parent
    found = [str(p) for p in root.rglob("*.py") if forbidden.search(p.read_text())]
    assert not found


@pytest.mark.parametrize("files", [{"../state.json": {}}, [], {}, None, "state.json"])
def test_a_manifest_lists_our_files_and_no_others(files, tmp_path, save):
    folder = save(1)
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))
    with pytest.raises(DataError, match="manifest.json: lists"):
        load_checkpoint(folder)
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not a readable JSON file"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {3: 1}}, "state.a has the key 3; JSON keys must be strings"),
        ({"a": [0, float("inf")]}, r"state.a\[1\] is inf; JSON holds finite numbers only"),
        ({"a": torch.zeros(1)}, "state.a is a Tensor; expected a JSON value"),
    ],
)
def test_a_state_that_json_would_change_is_refused_before_writing(state, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, 1, **state)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_optimiser_is_refused(tmp_path, save):
    folder = save(1)
    checkpoint = load_checkpoint(folder)
    wide = Decoder(ModelConfig(61, 24, 22, 2, 4, 2))
    with pytest.raises(
        DataError, match=r"mlp.gate_proj.weight' has shape \(20, 24\), the model needs \(22, 24\)"
    ):
        checkpoint.restore(wide)
    deep = Decoder(ModelConfig(61, 24, 20, 3, 4, 2))
    with pytest.raises(
        DataError, match="model.safetensors: tensor 'model.layers.2.input_layernorm.weight' is missing"
    ):
        checkpoint.restore(deep)
    with pytest.raises(
        ConfigError, match="option weight_decay is 0.2, in .* it is 0.1; resume with the old value"
    ):
        checkpoint.restore(*fresh(weight_decay=0.2))
    model, _ = fresh()
    single = torch.optim.AdamW(model.parameters())
    with pytest.raises(DataError, match="parameter groups are not those of the checkpoint"):
        checkpoint.restore(model, single)


@pytest.mark.parametrize(
    ("keep_last", "keep_steps", "left"),
    [(1, set(), [9]), (2, {2}, [2, 7, 9]), (3, {9}, [4, 7, 9]), (9, set(), [2, 4, 7, 9])],
)
def test_prune_keeps_the_last_and_the_named(keep_last, keep_steps, left, tmp_path, save):
    for step in (2, 4, 7, 9):
        save(step)
    (save(11) / "state.json").unlink()  # damaged: it does not count as one of the last, and stays
    (tmp_path / ".tmp-step-00000012-1").mkdir()
    deleted = prune(tmp_path, keep_last, keep_steps)
    assert deleted == sorted({2, 4, 7, 9} - set(left))
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [f"step-{s:08d}" for s in [*left, 11]]
    assert latest_checkpoint(tmp_path) == step_folder(tmp_path, 9)
    with pytest.raises(ConfigError, match="keep_last is 0"):
        prune(tmp_path, 0)


def test_an_unwritable_place_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        WriteError, match="file/run: a part of the path is a file, not a folder; write elsewhere"
    ):
        write(tmp_path / "file" / "run", 1)


@pytest.mark.parametrize(
    "most", [100, 3_000, 40_000]
)  # in the manifest or state, in the optimiser, in the model
def test_a_full_disk_leaves_the_old_save(tmp_path, save, limited, most):
    old = save(1)
    limited(most)
    with pytest.raises(WriteError, match="step-00000002: the file would be larger than .* write elsewhere"):
        write(tmp_path, 2)
    with pytest.raises(WriteError, match="step-00000001: the file would be larger"):
        write(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == [old.name]
    load_checkpoint(old)
