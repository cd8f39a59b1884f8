"""Checkpoints: exact round trips, and every way in which one can be damaged or cut short."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from rlfusion.common.weights import Live, Weights, WeightsError, pack, sha256, unpack
from rlfusion.training import checkpoint
from rlfusion.training.checkpoint import CheckpointError, Keep
from rlfusion.training.optimization import Optimization


def small(value: float) -> dict:
    return {"model": {"w": torch.full((3, 2), value)}, "step": 1}


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return (
        type(a) is type(b)
        and (a == b or (a != a and b != b))
        and (a != 0 or math.copysign(1, a) == math.copysign(1, b))
    )


def test_every_kind_of_state_comes_back_exactly(tmp_path):
    shared = torch.randn(4)
    state = {
        "a": {0: shared, "0": shared, 7: {"x/y": torch.tensor(1.5, dtype=torch.bfloat16)}},
        "b": [torch.arange(3), (1, 2.0, ("z",)), [], (), {}],
        "floats": [0.1, 1e-310, -0.0, 0.1 + 0.2, math.inf, -math.inf, math.nan, 1.7976931348623157e308],
        "scalars": [None, True, False, 2**80, "\u00fc\n\x00", 0],
        "strided": torch.randn(4, 6).t()[::2],
        "empty": torch.empty(0, 3),
        "tagged": {"tensor": "no", "dict": [1]},
    }
    path = checkpoint.save(tmp_path, 3, state)
    assert same(checkpoint.load(path), state)


def test_an_optimizer_goes_on_from_a_loaded_state_bit_for_bit(tmp_path):
    def fresh() -> Optimization:
        torch.manual_seed(0)
        return Optimization(torch.nn.Linear(5, 3), lr=0.1, ema=0.9)

    def steps(o: Optimization, first: int, last: int) -> None:
        for i in range(first, last):
            o.module(torch.full((2, 5), float(i))).square().sum().backward()
            o.step()

    whole, part, resumed = fresh(), fresh(), fresh()
    steps(whole, 0, 6)
    steps(part, 0, 3)
    resumed.load_state_dict(checkpoint.load(checkpoint.save(tmp_path, 3, {"learner": part.state_dict()}))["learner"])
    steps(resumed, 3, 6)
    assert same(resumed.state_dict(), whole.state_dict())


@pytest.mark.parametrize("bad", [{1, 2}, object(), 1j, b"bytes", {1.5: 0}, {(1, 2): 0}, torch.nn.Linear(1, 1)])
def test_a_state_that_is_no_plain_data_is_refused_by_place(tmp_path, bad):
    with pytest.raises(TypeError, match=r"outer/'inner'/1"):
        checkpoint.save(tmp_path, 1, {"outer": {"inner": [0, bad]}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["../up", "a/b", "", ".hidden", 3])
def test_a_top_level_name_that_is_no_file_name_is_refused(tmp_path, key):
    with pytest.raises(CheckpointError, match="top-level name"):
        checkpoint.save(tmp_path, 1, {key: torch.zeros(1)})


def test_the_newest_are_kept_and_the_newest_is_found(tmp_path):
    for step in (1, 5, 20, 100):
        checkpoint.save(tmp_path, step, small(step), keep=Keep(last=2))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    found = checkpoint.latest(tmp_path)
    assert (found.step, found.path, found.warnings) == (100, tmp_path / "step-00000100", ())


def test_saving_never_prunes_what_it_has_just_saved(tmp_path):
    for step in (10, 20, 5):
        checkpoint.save(tmp_path, step, small(step), keep=Keep(last=1))
    assert {p.name for p in tmp_path.iterdir()} == {"step-00000005", "step-00000020"}


def test_a_step_saved_again_is_replaced(tmp_path):
    checkpoint.save(tmp_path, 4, small(1))
    path = checkpoint.save(tmp_path, 4, small(2))
    assert same(checkpoint.load(path), small(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]


def test_a_replacement_that_was_cut_short_is_undone(tmp_path):
    path = checkpoint.save(tmp_path, 4, small(1))
    path.rename(tmp_path / f".replaced-{path.name}")
    assert checkpoint.latest(tmp_path).path == path


def test_no_folder_or_an_empty_one_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nowhere") is None


def flip(path, position):
    blob = bytearray(path.read_bytes())
    blob[position % len(blob)] ^= 1
    path.write_bytes(blob)


DAMAGE = {
    "tensor byte": lambda p: flip(p / "model.safetensors", -1),
    "header byte": lambda p: flip(p / "model.safetensors", 12),
    "state byte": lambda p: flip(p / "state.json", 20),
    "truncated": lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-1]),
    "empty": lambda p: (p / "state.json").write_bytes(b""),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "no shard": lambda p: (p / "model.safetensors").unlink(),
    "empty manifest": lambda p: (p / "manifest.json").write_text(""),
    "foreign manifest": lambda p: (p / "manifest.json").write_text("[1]"),
    "nothing inside": lambda p: [f.unlink() for f in p.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_named(tmp_path, caplog, damage):
    checkpoint.save(tmp_path, 1, small(1))
    bad = checkpoint.save(tmp_path, 2, small(2))
    damage(bad)
    with pytest.raises(CheckpointError, match="step-00000002"):
        checkpoint.load(bad)
    found = checkpoint.latest(tmp_path)
    assert found.step == 1
    assert len(found.warnings) == 1
    assert "step-00000002.corrupt" in found.warnings[0]
    assert found.warnings[0] in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002.corrupt"]
    assert same(checkpoint.load(found.path), small(1))


def test_any_byte_of_a_manifest_that_carries_meaning_is_guarded(tmp_path):
    path = checkpoint.save(tmp_path, 1, small(1))
    held = (path / "manifest.json").read_bytes()
    original = json.loads(held)
    for position in range(len(held)):
        blob = bytearray(held)
        blob[position] ^= 1
        try:
            changed = json.loads(blob) != original
        except ValueError:
            changed = True
        if changed:
            (path / "manifest.json").write_bytes(blob)
            with pytest.raises(CheckpointError):
                checkpoint.verify(path)


def test_a_second_damaged_checkpoint_of_a_step_is_set_aside_too(tmp_path):
    for _ in range(2):
        flip(checkpoint.save(tmp_path, 2, small(2)) / "state.json", 3)
        assert checkpoint.latest(tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002.corrupt", "step-00000002.corrupt-2"]


def test_leftovers_of_dead_writers_are_removed_and_those_of_living_ones_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = os.uname().nodename
    names = [f".part-step-00000009-{host}-{pid}" for pid in (dead.pid, 1)] + [".part-step-00000009-elsewhere-1"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("half")
    assert checkpoint.latest(tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names[1:])


def test_another_fingerprint_is_reported_and_not_refused(tmp_path, monkeypatch, caplog):
    path = checkpoint.save(tmp_path, 1, small(1))
    monkeypatch.setattr(
        "rlfusion.training.checkpoint.manifest.fingerprint", lambda: {**here, "torch": "0.1", "gpu": "none"}
    )
    here = json.loads((path / "manifest.json").read_text())["fingerprint"]
    warnings = checkpoint.latest(tmp_path).warnings
    assert len(warnings) == 1
    assert f"torch: {torch.__version__} there, 0.1 here" in warnings[0]
    assert same(checkpoint.load(path), small(1))
    assert warnings[0] in caplog.text


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from rlfusion.training import checkpoint
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"model": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoint.save(folder, 2, {"model": torch.zeros(10000)})
except OSError as error:
    print(error.errno, error.filename)
"""


def test_a_file_system_that_takes_no_more_leaves_the_previous_checkpoint(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(errno.EFBIG), str(tmp_path / "step-00000002")]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path).step == 1


def test_a_full_disk_at_any_sync_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, small(1))
    monkeypatch.setenv("RLFUSION_STORAGE_PATIENCE_S", "0")
    real, calls = os.fsync, []
    for fail_at in range(1, 5):  # three files, then the folder

        def fsync(held, fail_at=fail_at):
            calls.append(held)
            if len(calls) == fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(held)

        calls.clear()
        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"step-00000002': No space left"):
            checkpoint.save(tmp_path, 2, small(2))
        monkeypatch.setattr(os, "fsync", real)
        assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


WRITER = """
import sys, torch
from pathlib import Path
from rlfusion.training import checkpoint
torch.set_num_threads(1)
folder, step = Path(sys.argv[1]), int(sys.argv[2])
while True:
    step += 1
    state = {"model": {i: torch.full((100, 100), float(step)) for i in range(5)}, "step": step}
    for _ in range(2):  # the second save of a step replaces the first
        checkpoint.save(folder, step, state)
    print(step, flush=True)
"""


def test_a_writer_killed_at_any_time_leaves_a_verified_checkpoint(tmp_path):
    torch.manual_seed(0)
    step = 0
    for delay in (torch.rand(5) * 0.1).tolist():
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(step)], stdout=subprocess.PIPE, text=True
        )
        printed = int(writer.stdout.readline())
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        printed = max([printed, *map(int, writer.communicate()[0].split())])
        found = checkpoint.latest(tmp_path)
        assert found.warnings == ()
        assert found.step in (printed, printed + 1)  # the last may have been renamed, but not yet reported
        state = checkpoint.load(found.path)
        assert state["step"] == found.step
        assert all((tensor == found.step).all() for tensor in state["model"].values())
        assert all(p.name.startswith("step-") for p in tmp_path.iterdir())
        step = found.step


def test_write_json_atomic_replaces_whole_files(tmp_path):
    path = tmp_path / "a.json"
    checkpoint.write_json_atomic(path, {"x": 1})
    checkpoint.write_json_atomic(path, {"x": [0.1, None]})
    assert json.loads(path.read_text()) == {"x": [0.1, None]}
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        checkpoint.write_json_atomic(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": [0.1, None]}


def test_blobs_are_deterministic_and_come_back_in_memory_of_their_own():
    tensors = {"b": torch.randn(3), "a": torch.arange(4).reshape(2, 2).t(), "flag": torch.tensor(True)}
    blob = pack(tensors)
    assert blob == pack({name: tensors[name].clone() for name in reversed(tensors)})
    back = unpack(blob)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in back.values())


def test_weights_move_between_modules_and_refuse_what_does_not_fit():
    source, sink = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    weights = Weights.of(source, 7)
    source.weight.data.zero_()
    weights.load_into(sink)
    assert not torch.equal(sink.weight, source.weight)
    assert Weights.of(sink, 8).sha256 == weights.sha256 == sha256(weights.blob)
    with pytest.raises(WeightsError, match=r"version 7: SHA-256"):
        Weights(7, weights.sha256, weights.blob[:-1] + b"\x00").load_into(sink)
    with pytest.raises(WeightsError, match="SHA-256"):
        Weights(7, "0" * 64, weights.blob).load_into(sink)
    before = sink.weight.clone()
    for other, text in [
        (torch.nn.Linear(3, 2, bias=False), "bias is missing"),
        (torch.nn.Linear(3, 4), r"weight is torch.float32 \(4, 3\), expected torch.float32 \(2, 3\)"),
        (torch.nn.Linear(3, 2).double(), "weight is torch.float64"),
        (torch.nn.ModuleDict({"weight": torch.nn.Linear(1, 1)}), "weight.bias is not in the module"),
    ]:
        with pytest.raises(WeightsError, match=text):
            Weights.of(other, 1).load_into(sink)
    assert torch.equal(sink.weight, before)


def test_live_weights_are_copied_as_they_are_when_they_are_taken_and_packed_only_when_asked_for(monkeypatch):
    source, sink, other = (torch.nn.Linear(3, 2) for _ in range(3))
    live, packed = Live(source, 7), Weights.of(source, 7)
    with monkeypatch.context() as patch:
        patch.setattr("rlfusion.common.weights.pack", lambda tensors: pytest.fail("packed"))
        live.load_into(sink)
        assert live.mark != Live(source, 7).mark
    assert (live.version, live.sha256, live.blob) == (7, packed.sha256, packed.blob)
    packed.load_into(other)
    assert torch.equal(sink.weight, other.weight)
    source.weight.data.zero_()
    assert not torch.equal(sink.weight, source.weight), "they share no memory"
    with pytest.raises(WeightsError, match="the weights of version 1 does not fit"):
        Live(torch.nn.Linear(3, 4), 1).load_into(sink)
