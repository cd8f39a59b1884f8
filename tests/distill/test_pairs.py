"""Pairs of a teacher: what they are, who may make them, and what an interruption, damage or another teacher leaves."""

import json
import os
from pathlib import Path

import pytest
import torch
from rounding import ROUNDING

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.sampling import sample
from rlfusion.distill import pairs as pairs_module
from rlfusion.distill.pairs import Making, PairDraws, Pairs, Source, make_pairs
from rlfusion.rollout import Settings

CARD = models.Card(models.Config(net="ResidualMLP(width=16, depth=1)", kind="v"), (1, 2, 2), ("a", "b", "c"))
MAKING = Making(count=20, shard=8, steps=5)


def teacher(seed: int = 0) -> Denoiser:
    denoiser = models.build(CARD, seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=draw))
    return denoiser


def made(folder: Path, model: Denoiser | None = None, making: Making = MAKING, guidance: float = 0.0, **more) -> Pairs:
    return make_pairs(Source(model or teacher(), CARD, guidance), making, folder, 7, Settings(), **more)


def ends(pairs: Pairs, guidance: float) -> torch.Tensor:
    chain = MAKING.chain(guidance)
    model = teacher()
    policy = chain.policy(model, CARD.names)
    noise = torch.zeros(len(pairs.x0), 6, 1, 2, 2)
    noise[:, 0] = pairs.eps
    return sample(policy, noise, chain.times(model), pairs.label)


def equal(one: Pairs, other: Pairs) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_a_pair_is_noise_and_its_end_and_the_classes_are_even(tmp_path):
    pairs = made(tmp_path)
    assert (pairs.x0.shape, pairs.eps.shape) == ((20, 1, 2, 2), (20, 1, 2, 2))
    assert sorted(pairs.label.bincount().tolist()) in ([6, 7, 7], [6, 6, 8])
    assert torch.allclose(ends(pairs, 0.0), pairs.x0, **ROUNDING)
    assert len(pairs.eps.flatten(1).unique(dim=0)) == 20
    assert pairs.eps.mean().abs() < 0.4
    assert 0.7 < pairs.eps.std() < 1.3


def test_guidance_is_the_teachers(tmp_path):
    plain, guided = made(tmp_path / "plain"), made(tmp_path / "guided", guidance=2.0)
    assert torch.allclose(ends(guided, 2.0), guided.x0, **ROUNDING)
    assert not torch.allclose(plain.x0, guided.x0, atol=1e-2)


class Stopped(Exception):
    pass


def test_what_is_there_is_not_made_again(tmp_path):
    whole = made(tmp_path / "whole")

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        made(tmp_path / "cut", stop=stop)
    first = tmp_path / "cut" / "shard-00000.safetensors"
    assert sorted(f.name for f in first.parent.iterdir()) == ["pairs.json", first.name]
    written = first.stat().st_mtime_ns
    assert equal(made(tmp_path / "cut"), whole)
    assert first.stat().st_mtime_ns == written


def test_a_signal_is_noticed_between_the_walks_of_a_shard(tmp_path, monkeypatch):
    """Of 20 pairs in shards of 8, walks of 3 at a time: at the fifth look the second shard is under way."""
    whole, looks = made(tmp_path / "whole"), []

    def stop() -> None:
        looks.append(1)
        if len(looks) == 5:
            raise Stopped

    monkeypatch.setattr(pairs_module, "ITEM", 3)
    with pytest.raises(Stopped):
        made(tmp_path / "cut", stop=stop)
    assert sorted(f.name for f in (tmp_path / "cut").iterdir()) == ["pairs.json", "shard-00000.safetensors"]
    again = made(tmp_path / "cut")
    assert torch.allclose(again.x0, whole.x0, **ROUNDING)
    assert torch.equal(again.eps, whole.eps)


def test_another_count_makes_them_again_and_takes_no_short_shard(tmp_path):
    told: list[str] = []
    few = made(tmp_path)
    more = made(tmp_path, making=Making(count=24, shard=8, steps=5), say=told.append)
    assert len(told) == 3
    assert len(more.x0) == 24
    assert torch.equal(more.x0[:16], few.x0[:16])


@pytest.mark.parametrize("harm", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_damage_is_told_and_made_again(tmp_path, harm):
    whole, told = made(tmp_path), []
    shard = tmp_path / "shard-00001.safetensors"
    shard.write_bytes(harm(shard.read_bytes()))
    assert equal(made(tmp_path, say=told.append), whole)
    assert len(told) == 1
    assert "shard-00001.safetensors" in told[0]
    assert (tmp_path / f"{shard.name}.corrupt").is_file()
    shard.write_bytes(b"again")
    assert equal(made(tmp_path), whole)
    assert (tmp_path / f"{shard.name}.corrupt-2").read_bytes() == b"again"  # the first stays


@pytest.mark.parametrize("name", ["shard-00001.safetensors", "pairs.json"])
@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_in_its_place_is_set_aside(name, put, tmp_path):
    whole = made(tmp_path)
    (tmp_path / name).unlink()
    put(tmp_path / name)
    assert equal(made(tmp_path), whole)
    assert (tmp_path / name).is_file()
    written = {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")}
    assert equal(made(tmp_path), whole)
    assert {f: f.stat().st_mtime_ns for f in tmp_path.glob("*.safetensors")} == written


@pytest.mark.parametrize(
    "content",
    ["", "null", "3", "[]", "{}", "[" * 200_000, '{"identity": 3}', "\ufeff{}", '{"identity": "I", "shards": null}',
     '{"identity": "I", "shards": []}', '{"identity": "I", "shards": [1]}', '{"identity": "I", "shards": "x"}',
     '{"identity": "I", "shards": {"shard-00000.safetensors": [3]}}'],
)  # fmt: skip
def test_a_manifest_that_is_none_costs_the_pairs_alone(content, tmp_path):
    whole, manifest = made(tmp_path), tmp_path / "pairs.json"
    manifest.write_text(content.replace('"I"', json.dumps(json.loads(manifest.read_text())["identity"])))
    assert equal(made(tmp_path), whole)
    assert len(list(tmp_path.glob("*.corrupt"))) == 3


def test_pairs_of_another_teacher_are_not_taken(tmp_path):
    told: list[str] = []
    first = made(tmp_path)
    second = made(tmp_path, teacher(seed=1), say=told.append)
    assert len(told) == 3
    assert not torch.equal(first.x0, second.x0)
    assert torch.equal(first.eps, second.eps)


def test_a_draw_has_the_noise_of_its_sample(tmp_path):
    pairs = made(tmp_path)
    draw = PairDraws(lambda: pairs, 3, 5, 10, torch.device("cpu"), 0, "test")(3)
    at = draw.index
    assert torch.equal(draw.x0, pairs.x0[at])
    assert torch.equal(draw.eps, pairs.eps[at])
    assert torch.equal(draw.cond, pairs.label[at])


def test_fewer_pairs_than_classes_are_refused():
    with pytest.raises(ConfigError, match="count = 2"):
        Making(count=2).check(CARD, teacher())
    with pytest.raises(ConfigError, match="steps = 0"):
        Making(steps=0)
