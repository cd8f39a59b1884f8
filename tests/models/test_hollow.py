"""Models without memory for their parameters: all else is theirs as ever, and the rows of each parameter are found."""

import json
from dataclasses import replace

import pytest
import torch
from saved_models import CARD, CARDS, scrambled
from tiny_pipelines import MAKERS, PROMPTS, about
from torch import nn

from rlfusion import models
from rlfusion.common import hollow
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import pack, sha256
from rlfusion.models import Card, Config, pipelines

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MORE = [
    replace(CARDS[3], captioned=True, names=("a red cat", "two dogs")),
    replace(CARDS[2], weights=(0.0, 4.0)),
    replace(CARD, boundary="LCM(sigma_data=0.5)"),
    Card(Config("Points(count=4)", "Rectified()", "flow"), (1, 8, 8), ("0", "1")),
]


def same(a: nn.Module, b: nn.Module, filling: hollow.Filling, ranks: int = 3) -> None:
    """Whether a module without memory, and where its rows are, is the other: names, kinds, rows and buffers."""
    names = dict(b.named_parameters(remove_duplicate=False))
    ours = dict(a.named_parameters(remove_duplicate=False))
    assert list(ours) == list(names)
    for name, p in ours.items():
        assert p.is_meta, name
        assert (p.shape, p.dtype, p.requires_grad) == (names[name].shape, names[name].dtype, names[name].requires_grad)
        each = -(-len(p) // ranks)
        rows = [filling[p](slice(min(i * each, len(p)), min((i + 1) * each, len(p)))) for i in range(ranks)]
        assert torch.equal(torch.cat(rows), names[name]), name
        assert all(row.dtype == p.dtype for row in rows)
    held, buffers = dict(b.named_buffers()), dict(a.named_buffers())
    assert buffers.keys() == held.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == held[name].dtype
        assert torch.equal(buffer, held[name]), name


@pytest.mark.parametrize("card", [*CARDS, *MORE], ids=lambda c: f"{c.config.net} {c.captioned:d}{c.boundary}")
def test_a_saved_model_is_found_row_by_row(card, tmp_path):
    denoiser = scrambled(card)
    models.save(tmp_path, denoiser, card)
    found, held, filling = models.load_hollow(tmp_path)
    assert held == card
    same(found, models.load(tmp_path)[0], filling)
    assert (found.weights, repr(found.schedule)) == (denoiser.weights, repr(denoiser.schedule))


def test_parameters_are_real_again_outside_and_ties_are_kept():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    with hollow.parameters():
        tied = Tied()
    assert tied.a.weight is tied.b.weight
    assert hollow.is_hollow(tied)
    with hollow.standing_in(tied):
        assert tied.a.weight is tied.b.weight
        assert tied.a.weight.device.type == "cpu"
        assert tied.a.weight.untyped_storage().nbytes() == 4
    assert tied.a.weight is tied.b.weight
    assert tied.a.weight.is_meta
    assert not hollow.is_hollow(nn.Linear(3, 3))


class Scaled(nn.Module):
    """A network of one's own with a buffer that is made of a parameter."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.register_buffer("scale", self.weight.detach() * 2, persistent=False)


def test_buffers_that_are_saved_have_the_values_of_the_file(tmp_path):
    saved = nn.BatchNorm1d(3)
    saved.running_mean.fill_(2.0)
    file = tmp_path / "a.safetensors"
    file.write_bytes(pack(saved.state_dict()))
    with hollow.parameters():
        made = nn.BatchNorm1d(3)
    filling = hollow.filling(made, hollow.Files.of(file), {name: name for name in made.state_dict()})
    same(made, saved, filling)


@pytest.mark.parametrize("text", ["LoRA(rank=2)", "LoRA(rank=2, dropout=0.5)"])
@pytest.mark.parametrize("card", CARDS[2:], ids=lambda c: c.config.net)
def test_adapters_get_the_initial_weights_that_they_get_beside_real_ones(card, text, tmp_path):
    models.save(tmp_path, scrambled(card), card)
    (found, _, filling), real = models.load_hollow(tmp_path), models.load(tmp_path)[0]
    for denoiser in (found, real):
        models.adapt(denoiser, card, text, 3)
    theirs = dict(real.named_parameters())
    assert any(p.requires_grad for p in theirs.values())
    for name, p in found.named_parameters():
        assert p.requires_grad == theirs[name].requires_grad
        assert p.is_meta == (p in filling) == (not p.requires_grad)
        assert p.is_meta or torch.equal(p, theirs[name])


DAMAGES = {
    "flipped": "do not match the SHA-256",
    "no digest": "states no SHA-256",
    "missing": "is missing",
    "over": "is in the file, and not in the model",
    "shape": "is of shape",
    "no file": "cannot be loaded",
    "none of safetensors": "cannot be loaded",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_are_others_are_refused_before_any_is_used(damage, tmp_path):
    models.save(tmp_path, scrambled(CARD), CARD)
    file = tmp_path / "weights.safetensors"
    held = models.load(tmp_path)[0].state_dict()
    name = next(iter(held))
    other = {
        "missing": {n: w for n, w in held.items() if n != name},
        "over": held | {"one_more": torch.ones(2)},
        "shape": held | {name: held[name][:-1]},
    }
    about = {k: v for k, v in json.loads((tmp_path / "model.json").read_text()).items() if k != "seal"}
    if damage in other:
        file.write_bytes(pack(other[damage]))
        about["sha256"] = sha256(pack(other[damage]))
    elif damage == "no digest":
        del about["sha256"]
    elif damage == "no file":
        file.unlink()
    elif damage == "none of safetensors":
        file.write_bytes(b"nothing")
        about["sha256"] = sha256(b"nothing")
    else:
        blob = bytearray(file.read_bytes())
        blob[-1] ^= 1
        file.write_bytes(blob)
    (tmp_path / "model.json").write_bytes(models.sealed(about))
    with pytest.raises(ConfigError, match=DAMAGES[damage]) as told:
        models.load_hollow(tmp_path)
    assert "\n" not in str(told.value)


def test_a_network_that_makes_buffers_of_its_parameters_is_refused():
    with hollow.parameters():
        made = Scaled((2, 2), 3)
    with pytest.raises(ConfigError, match=r"buffer 'scale'.*learner\.shard = none"):
        hollow.require_buffers(made, "net = 'Scaled()'")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_pipeline_is_found_row_by_row_as_diffusers_reads_it(name, dtype, tiny_pipelines):
    held = about(tiny_pipelines[name], dtype=dtype)
    found, filling = pipelines.build_hollow(held, PROMPTS)
    real = pipelines.build(held, PROMPTS)
    same(found, real, filling)
    assert found.net.training == real.net.training
    assert found.net.model.training == real.net.model.training
    assert dict(found.net.model.config) == dict(real.net.model.config)


def test_files_of_several_parts_and_of_a_variant_are_read(tiny_pipelines, tmp_path):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(tiny_pipelines["sd3"])
    parted, variant = {"max_shard_size": "40KB"}, {"variant": "fp16"}
    for i, how in enumerate((parted, variant, parted | variant)):
        folder = tmp_path / f"sd3-{i}"
        pipe.save_pretrained(folder, **how)
        held = about(folder, variant=how.get("variant", ""), side=16, negatives=["", ""])
        found, filling = pipelines.build_hollow(held, PROMPTS)
        same(found, pipelines.build(held, PROMPTS), filling)
        assert (len(list((folder / "transformer").glob("*.safetensors"))) > 1) == (i != 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_adapters_of_earlier_runs_are_merged_layer_by_layer_to_the_same_bits(name, dtype, tiny_pipelines, tmp_path):
    held = about(tiny_pipelines[name], dtype=dtype)
    for number in range(2):
        denoiser = pipelines.build(held, PROMPTS)
        card = Card(Config("", "", ""), (3, 16, 16), tuple(PROMPTS), pipeline=held)
        models.adapt(denoiser, card, "LoRA(rank=2, alpha=3.0)", number)
        torch.manual_seed(number)
        for p in denoiser.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.03)
        folder = tmp_path / str(number)
        held = pipelines.placed(pipelines.save(folder, denoiser.net, denoiser.space, held), folder)
    assert len(held["adapters"]) == 2
    found, filling = pipelines.build_hollow(held, PROMPTS)
    real = pipelines.build(held, PROMPTS)
    same(found, real, filling)
    base = pipelines.build(about(tiny_pipelines[name], dtype=dtype), PROMPTS).state_dict()
    assert any(not torch.equal(base[n], w) for n, w in real.state_dict().items())


def test_a_large_network_is_written_in_several_files_that_diffusers_reads(tiny_pipelines, tmp_path, monkeypatch):
    monkeypatch.setattr("rlfusion.models.pipelines.hollow.SHARD", 40_000)
    held = about(tiny_pipelines["sd3"])
    denoiser = pipelines.build(held, PROMPTS)
    for p in denoiser.net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    saved = pipelines.placed(pipelines.save(tmp_path, denoiser.net, denoiser.space, held), tmp_path)
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 2
    again = pipelines.build(saved, PROMPTS).state_dict()
    assert all(torch.equal(again[name], w) for name, w in denoiser.state_dict().items())
