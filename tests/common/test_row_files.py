"""Weights that travel as files of rows: what arrives is what was sent, or is refused by name."""

import json

import pytest
import torch

from rlfusion.common import row_files, streamed
from rlfusion.common.shards import rows
from rlfusion.common.weights import Weights, WeightsError
from rlfusion.rollout.item import WorkItem
from rlfusion.rollout.ray_worker import Worker
from rlfusion.rollout.wire import Acted


class Net(torch.nn.Module):
    """Rows that ranks share unevenly, fewer rows than ranks, and what no rank splits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.a = torch.nn.Parameter(torch.randn(5, 3, generator=draw))
        self.b = torch.nn.Parameter(torch.randn(2, generator=draw).bfloat16())
        self.register_buffer("seen", torch.tensor(seed))
        self.register_buffer("table", torch.randn(4, generator=draw))


SPLIT, COUNT = ("a", "b"), 3


def sent(net: Net, folder, version: int = 7) -> bytes:
    """The manifest of the files that three ranks write."""
    digests = []
    for rank in range(COUNT):
        own = {n: t[rows(len(t), rank, COUNT)] if n in SPLIT else t for n, t in net.state_dict().items()}
        parts = {n: streamed.part(t) for n, t in own.items() if n in SPLIT or not rank}
        digests.append(streamed.write(folder / row_files.name_of(version, rank, COUNT), parts))
    return row_files.joined("mine", version, folder, digests)


def test_what_ranks_write_is_what_a_worker_has(tmp_path):
    net, other = Net(1), Net(2)
    weights = Weights.manifest(7, sent(net, tmp_path))
    assert len(weights.blob) < 1000
    weights.load_into(other)
    for name, tensor in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


def test_this_process_writes_its_rows_and_finds_them(tmp_path):
    net = Net(1)
    digest = row_files.write(tmp_path, net.state_dict(), 3, 0, 1)
    blob = row_files.joined("mine", 3, tmp_path, [digest])
    found = row_files.own(row_files.Manifest.unpacked(blob), 0, net.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    row_files.discard(blob, 0)
    assert not list(tmp_path.iterdir())


def test_what_a_bundle_keeps_outlives_the_files_of_the_run(tmp_path):
    run, kept = tmp_path / "run", tmp_path / "kept"
    run.mkdir()
    kept.mkdir()
    blob, other = sent(Net(1), run), Net(2)
    row_files.keep(blob, kept)
    for rank in range(COUNT):
        row_files.discard(blob, rank)
    Weights.manifest(7, row_files.moved(blob, kept)).load_into(other)
    assert torch.equal(other.a, Net(1).a)


DAMAGES = {
    "flipped": "does not match its SHA-256",
    "gone": "cannot be read .*root must be storage that all nodes share",
    "other version": "their files are of version 8",
    "manifest": "SHA-256 .*, expected",
    "few rows": "a has 3 rows, expected 5",
    "other shape": "expected torch.float32",
    "one more": "more is not in the module",
    "stale file": "does not match its SHA-256",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_announced_is_refused(damage, tmp_path, monkeypatch):
    net = Net(1)
    if damage == "one more":
        net.register_buffer("more", torch.ones(1))
    if damage == "other shape":
        net.a = torch.nn.Parameter(torch.ones(5, 4))
    if damage == "few rows":
        net.a = torch.nn.Parameter(net.a.detach()[:3])
    blob = sent(net, tmp_path, 8 if damage == "other version" else 7)
    weights = Weights.manifest(7, blob)
    file = tmp_path / row_files.name_of(7, 1, COUNT)
    if damage == "flipped":
        held = bytearray(file.read_bytes())
        held[-1] ^= 1
        file.write_bytes(held)
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        weights = Weights(7, weights.sha256, blob.replace(b"mine", b"none"))
    elif damage == "stale file":
        sent(Net(3), tmp_path)
    worker = Worker()
    worker.acting, worker.task = Acted("mine", 6, "older"), type("Task", (), {"policy": Net(2)})
    monkeypatch.setattr("ray.get", lambda held: held)
    item = WorkItem(0, 0, 0, 0, (0,), 7).to_json()
    with pytest.raises(WeightsError, match=DAMAGES[damage]) as told:
        worker.run(item, Acted("mine", 7, weights.sha256), [weights.blob])
    assert "\n" not in str(told.value)
    assert worker.acting == Acted("mine", -1, ""), "neither these weights nor the older ones are taken for loaded"


def test_weights_that_begin_like_no_manifest_are_none():
    assert not row_files.is_manifest(Weights.of(Net(1), 1).blob)
    assert row_files.is_manifest(row_files.Manifest("r", 1, "/f", ("0",)).packed())
    assert json.loads(row_files.Manifest("r", 1, "/f", ("0",)).packed())["run"] == "r"
