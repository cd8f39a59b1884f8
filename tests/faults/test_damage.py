"""Checkpoints and models damaged in every way that seeds can think of: the right result, or one line; nothing else."""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from saved_models import CARD, scrambled

from rlfusion import models
from rlfusion.common.errors import RlfusionError
from rlfusion.common.weights import pack, require_entries, sha256
from rlfusion.training import checkpoint, identity
from rlfusion.training.optimization import Optimization

TOTAL, EVERY = 6, 2
CASES = 240


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    updates: int = TOTAL


class Counted:
    """A learner of two layers, whose update is a pure function of its state and the step."""

    def __init__(self, width: int = 4) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 2))
        self.optimization = Optimization(self.module, lr=0.05, ema=0.9)

    def update(self, step: int) -> None:
        self.module(torch.full((2, 3), step / 5)).square().sum().backward()
        self.optimization.step()

    def state_dict(self) -> dict:
        return {"optimization": self.optimization.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        require_entries(state, self.state_dict(), "the learner")
        self.optimization.load_state_dict(state["optimization"])


REFUSED = "refused"


def outcome(job: Callable[[], str]) -> str:
    """What a job ends with; REFUSED where that is one line and exit code 2."""
    try:
        return job()
    except RlfusionError as error:
        return REFUSED if error.exit_code == 2 and "\n" not in str(error).strip() else repr(error)


def train(folder: Path, total: int, learner: Counted | None = None) -> str:
    """Go on in ``folder`` to ``total`` updates, as ``fitting.fit`` does; the digest of what comes of it."""
    run, learner = identity.enter(folder, "finetune", Settings()), learner or Counted()
    found = run.newest(TOTAL)
    if found:
        state = checkpoint.load(found.path)
        with checkpoint.loading(found.path):
            learner.load_state_dict(state)
    for step in range(found.step if found else 0, total):
        learner.update(step)
        if (step + 1) % EVERY == 0:
            run.save(step + 1, learner.state_dict())
    return sha256(pack(learner.module.state_dict() | learner.optimization.ema.shadow))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """A run after 4 of its 6 updates, another of the same settings that is ahead of it, and one of another net."""
    root = tmp_path_factory.mktemp("made")
    for name, total, width in (("mine", 4, 4), ("other", 6, 4), ("wide", 6, 7)):
        (root / name).mkdir()
        train(root / name, total, Counted(width))
    return {name: root / name for name in ("mine", "other", "wide")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> str:
    return train(tmp_path_factory.mktemp("whole"), TOTAL)


HUGE = [None, True, -1, 10**30, 1e308, "x" * 5000, [], {}, [[[]]], "\x00", {"a": [1]}]


def bytes_of(folder: Path, draw: random.Random) -> None:
    """A byte of a file flipped, or the file cut short, emptied, or made longer."""
    file = draw.choice(sorted(f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()))
    blob = bytearray(file.read_bytes())
    at = draw.randrange(len(blob)) if blob else 0
    how = draw.choice(["flip", "cut", "empty", "longer"])
    if how == "flip" and blob:
        blob[at] ^= 1 << draw.randrange(8)
    elif how == "cut":
        del blob[at:]
    elif how == "empty":
        blob.clear()
    else:
        blob += draw.randbytes(9)
    file.write_bytes(blob)


def in_place(folder: Path, draw: random.Random) -> None:
    """A file removed, or a folder, a link or a pipe in its place."""
    file = draw.choice(sorted(f for f in folder.rglob("*") if f.is_file()))
    file.unlink()
    how = draw.choice(["nothing", "folder", "loop", "nowhere", "device", "pipe", "another"])
    if how == "folder":
        file.mkdir()
    elif how == "pipe":
        os.mkfifo(file)
    elif how != "nothing":
        places = {"loop": file, "nowhere": "/nowhere", "device": "/dev/zero", "another": file.with_name("state.json")}
        file.symlink_to(places[how])


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def renamed(folder: Path, draw: random.Random) -> None:
    """A checkpoint under the name of another step, or a name that is none."""
    path = draw.choice(checkpoints(folder))
    name = draw.choice(["step-00000005", "step-00000006", "step-00000099", "step-99", "step-000000004", "4", "step-"])
    path.rename(path.with_name(name))


def swapped(folder: Path, draw: random.Random) -> None:
    """A file of one checkpoint in the place of another's, or of a file beside it."""
    first, second = draw.sample(sorted(f for f in (folder / "checkpoints").rglob("*") if f.is_file()), 2)
    held = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(held)


def manifest(path: Path, change: Callable[[dict], None]) -> None:
    """Change a manifest, and make its digest right again."""
    held = json.loads((path / "manifest.json").read_text())
    held.pop("sha256")
    change(held)
    digest = sha256(json.dumps(held, sort_keys=True).encode())
    (path / "manifest.json").write_text(json.dumps({**held, "sha256": digest}))


def edited(folder: Path, draw: random.Random) -> None:
    """A manifest edited, with its digest made right; where it says another step, the folder renamed too."""
    path = draw.choice(checkpoints(folder))
    key = draw.choice(["format", "step", "run", "settings", "files", "fingerprint", "step and name"])
    if key == "step and name":
        manifest(path, lambda held: held.update(step=5))
        path.rename(path.with_name("step-00000005"))
    elif key == "files" and draw.random() < 0.5:
        name = draw.choice(["../../run.json", "state.json/..", "/etc/hostname", "nowhere.safetensors"])
        manifest(path, lambda held: held["files"].update({name: {"size": 1, "sha256": "0"}}))
    elif draw.random() < 0.3:
        manifest(path, lambda held: held.pop(key))
    else:
        manifest(path, lambda held: held.update({key: draw.choice(HUGE)}))


def rewritten(folder: Path, draw: random.Random) -> None:
    """A file of a checkpoint replaced by another form of JSON or safetensors, all digests made right."""
    path = draw.choice(checkpoints(folder))
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    blobs = [json.dumps(value).encode() for value in HUGE] + [b"[" * 100_000, b"{" + b'"a":{' * 50_000, b"\xff\xfe"]
    blobs += [(2**62).to_bytes(8, "little"), len(header).to_bytes(8, "little") + header, pack({"b": torch.ones(1)})]
    name, blob = draw.choice(["state.json", "optimization.safetensors"]), draw.choice(blobs)
    if name == "state.json" and draw.random() < 0.5:  # the outer form right, the state in it not
        held = json.loads((path / name).read_text())
        blob = json.dumps(held | {"state": draw.choice([*HUGE, {"dict": [["optimization", 1]]}])}).encode()
    (path / name).write_bytes(blob)
    manifest(path, lambda held: held["files"].update({name: {"size": len(blob), "sha256": sha256(blob)}}))


def foreign(folder: Path, draw: random.Random) -> None:
    """Checkpoints of another run of the same settings, or of another net, as they are or with a forged owner."""
    source = folder.parent / draw.choice(["other", "wide"])
    for path in draw.sample(checkpoints(source), draw.choice([1, 3])):
        place = folder / "checkpoints" / path.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(path, place)
        if source.name == "wide" and draw.random() < 0.5:
            forge(place, identity.Record.read(folder))


def forge(path: Path, record: identity.Record) -> None:
    held = json.loads((path / "state.json").read_text()) | {"run": record.run, "settings": record.digests[-1]}
    blob = json.dumps(held).encode()
    (path / "state.json").write_bytes(blob)
    entry = {"state.json": {"size": len(blob), "sha256": sha256(blob)}}
    manifest(path, lambda m: m.update(run=record.run, settings=record.digests[-1], files=m["files"] | entry))


def gone(folder: Path, draw: random.Random) -> None:
    """Checkpoints removed, or a file or a link in the place of a folder."""
    paths = [folder / "checkpoints", *checkpoints(folder)]
    path = draw.choice(paths)
    copy = folder / "copy"
    path.rename(copy)
    how = draw.choice(["nothing", "file", "link to it", "loop", "empty"])
    if how == "file":
        path.write_text("x")
    elif how == "empty":
        path.mkdir()
    elif how != "nothing":
        path.symlink_to(copy if how == "link to it" else path)


def record(folder: Path, draw: random.Random) -> None:
    """run.json with an entry of another form, its digest made right or not; or gone."""
    file = folder / identity.FILE
    if draw.random() < 0.3:
        file.unlink()
        return
    held = json.loads(file.read_text())
    stated, key = held.pop("sha256"), draw.choice(sorted(held))
    held[key] = draw.choice(HUGE)
    digest = sha256(json.dumps(held, sort_keys=True).encode()) if draw.random() < 0.7 else stated
    file.write_text(json.dumps({**held, "sha256": digest}))


KINDS = [bytes_of, in_place, renamed, swapped, edited, rewritten, foreign, gone, record]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_damaged_run_ends_with_the_same_bits_or_one_line(made, whole, tmp_path, kind):
    ends = []
    for seed in range(-(-CASES // len(KINDS))):
        draw, folder = random.Random(f"{kind.__name__} {seed}"), tmp_path / str(seed) / "mine"
        for name, source in made.items():
            shutil.copytree(source, folder.with_name(name))
        for _ in range(draw.choice([1, 1, 2]) if kind not in (gone, record) else 1):
            kind(folder, draw)
        ended = outcome(lambda folder=folder: train(folder, TOTAL))
        assert ended in (whole, REFUSED), f"seed {seed}"
        ends.append(ended)
    assert {whole} <= set(ends)


def test_states_of_another_net_are_refused_by_their_first_key(made, tmp_path):
    shutil.copytree(made["wide"], tmp_path / "wide")
    with pytest.raises(checkpoint.CheckpointError, match=r"0\.bias.*\(7,\), expected .*\(4,\)"):
        train(tmp_path / "wide", TOTAL)


def loaded(folder: Path) -> str:
    """All that a saved model is, as text."""
    denoiser, card = models.load(folder)
    return f"{sha256(pack(denoiser.state_dict()))} {card}"


@pytest.mark.parametrize("seed", range(60))
def test_a_damaged_model_is_the_same_model_or_one_line(tmp_path, seed):
    draw = random.Random(seed)
    models.save(tmp_path, scrambled(CARD), CARD)
    sound = loaded(tmp_path)
    file = tmp_path / "model.json"
    if seed % 3 == 0:
        bytes_of(tmp_path, draw)
    elif seed % 3 == 1:
        in_place(tmp_path, draw)
    else:
        held = json.loads(file.read_text())
        held.pop("seal")
        key = draw.choice(sorted(held))
        held.pop(key) if draw.random() < 0.3 else held.update({key: draw.choice(HUGE)})
        file.write_bytes(models.sealed(held))

    assert outcome(lambda: loaded(tmp_path)) in (sound, REFUSED)
