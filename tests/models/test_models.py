"""Model folders: what is saved comes back bit for bit, and what is damaged or does not fit is refused."""

import json

import pytest
import torch
from saved_models import CARD, CARDS, scrambled

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import pack
from rlfusion.models import Card, Config


@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.config.net)
def test_a_saved_model_comes_back_bit_for_bit(card, tmp_path):
    denoiser = scrambled(card)
    models.save(tmp_path / "run" / "model", denoiser, card)
    x, t = torch.randn(5, *card.shape), torch.tensor(0.3, dtype=torch.float64)
    label = torch.arange(5) % (card.classes + 1)
    for path in (tmp_path / "run", tmp_path / "run" / "model"):
        loaded, held = models.load(path)
        assert held == card
        assert repr(loaded.schedule) == repr(denoiser.schedule)
        assert loaded.kind == denoiser.kind
        with torch.no_grad():
            ours, theirs = loaded(x, t, label), denoiser(x, t, label)
        assert torch.equal(ours.x0, theirs.x0)
        assert torch.equal(ours.eps, theirs.eps)


def test_initial_weights_are_keyed_by_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (models.build(CARD, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def damage(name: str):
    def apply(folder):
        weights, about = folder / "weights.safetensors", folder / "model.json"
        blob, card = bytearray(weights.read_bytes()), json.loads(about.read_text())
        if name == "one bit":
            blob[-5] ^= 1
        elif name == "cut short":
            del blob[len(blob) // 2 :]
        elif name == "another model's":
            blob = pack(scrambled(CARD, seed=2).state_dict())
        elif name == "another architecture's":
            blob, card = pack(scrambled(CARDS[1]).state_dict()), {k: card[k] for k in card if k != "sha256"}
        elif name == "card of another net":
            card["config"]["net"] = "ResidualMLP(width=32, depth=1)"
        elif name == "no config":
            del card["config"]
        elif name == "odd config":
            card["config"]["nett"] = "UNet()"
        elif name == "other format":
            card["format"] = "rlfusion-model-99"
        weights.write_bytes(blob)
        about.write_text("{" if name == "half a card" else json.dumps(card))
        if name == "no weights":
            weights.unlink()

    return pytest.param(apply, id=name)


DAMAGE = ["one bit", "cut short", "another model's", "another architecture's", "card of another net", "no config"]
DAMAGE += ["odd config", "other format", "half a card", "no weights"]


@pytest.mark.parametrize("apply", [damage(name) for name in DAMAGE])
def test_a_damaged_or_mismatching_model_is_refused_by_name(apply, tmp_path):
    models.save(tmp_path, scrambled(CARD), CARD)
    apply(tmp_path)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        models.load(tmp_path)


@pytest.mark.parametrize("form", [models.FORMAT, models.UNSEALED])
def test_a_model_that_states_no_digest_is_refused(tmp_path, form):
    models.save(tmp_path, scrambled(CARD), CARD)
    card = json.loads((tmp_path / "model.json").read_text())
    bare = {name: value for name, value in card.items() if name not in ("sha256", "seal")} | {"format": form}
    (tmp_path / "model.json").write_bytes(models.sealed(bare))
    with pytest.raises(ConfigError, match="states no SHA-256"):
        models.load(tmp_path)


@pytest.mark.parametrize("entry", ["names", "shape", "config", "chain", "sha256"])
def test_a_description_that_was_edited_is_refused(tmp_path, entry):
    models.save(tmp_path, scrambled(CARD), CARD)
    card = json.loads((tmp_path / "model.json").read_text())
    edited = {"names": ["x", "y", "z"], "shape": [1, 2, 8], "chain": {"steps": 3}, "sha256": "0" * 64}
    new = edited.get(entry, dict(card["config"], kind="v") if entry == "config" else None)
    assert new != card[entry]
    (tmp_path / "model.json").write_text(json.dumps(card | {entry: new}, indent=1))
    with pytest.raises(ConfigError, match="does not match its own SHA-256"):
        models.load(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(card, indent=1))
    models.load(tmp_path)


def test_a_model_of_an_earlier_version_is_read(tmp_path):
    models.save(tmp_path, scrambled(CARD), CARD)
    card = json.loads((tmp_path / "model.json").read_text())
    card.pop("seal")
    (tmp_path / "model.json").write_text(json.dumps(card | {"format": models.UNSEALED}))
    assert models.load(tmp_path)[1] == CARD


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no model"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"net": "ResidualMPL()"}, ["network 'ResidualMPL'", "did you mean 'ResidualMLP'?"]),
        ({"net": "ResidualMLP(widht=8)"}, ["'widht'", "did you mean 'width'?"]),
        ({"net": "ResidualMLP(width=33)"}, ["width = 33"]),
        ({"net": "ResidualMLP(width='x')"}, ["ResidualMLP", "width = x"]),
        ({"net": "ResidualMLP(classes=3)"}, ["classes come from the data"]),
        ({"schedule": "Cosin()"}, ["schedule 'Cosin'", "did you mean 'Cosine'?"]),
        ({"kind": "epz"}, ["'epz'", "did you mean 'eps'?"]),
    ],
)
def test_an_unknown_net_schedule_or_kind_names_the_nearest(settings, said):
    with pytest.raises(ConfigError) as caught:
        models.build(Card(Config(**settings), (1, 8, 8), ("a",)))
    assert all(part in str(caught.value) for part in said), caught.value
