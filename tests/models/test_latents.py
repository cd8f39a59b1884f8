"""Autoencoders: the bound against closed forms, latents through every command, diffusers' own, damaged files."""

import json
import math
import shutil
import signal

import numpy as np
import pytest
import torch
from processes import Process, rlfusion
from rounding import ROUNDING
from tiny_runs import TINY
from torch import nn

from rlfusion import models, pretrain
from rlfusion.common.errors import ConfigError
from rlfusion.config import Base
from rlfusion.data import Dataset, digits, to_pixels
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.evaluation import require_bound
from rlfusion.jobs import pretrain_autoencoder
from rlfusion.jobs.pretrain import _digest, card_of
from rlfusion.models import autoencoder
from rlfusion.models.autoencoder import KLVAE, Latents, encoded, fitted, from_diffusers, negative_elbo

QUICK = ("--steps", 120, "--batch", 32, "--lr", 0.01, "--model.width", 8, "--checkpoint_every", 20)
MODEL = ("--train.steps", 40, "--train.batch", 16, "--evaluation.samples", 60, "--chain.steps", 2)
MODEL = (*MODEL, "--model.net", "ResidualMLP(width=16, depth=1)")


@pytest.mark.parametrize("off", [0.0, 0.4])
def test_the_bound_is_the_log_likelihood_at_the_exact_posterior_and_less_elsewhere(off):
    """x = a z + noise e, z ~ N(0, 1): p(x) = N(0, a^2 + noise^2), posterior N(a x / S, noise^2 / S)."""
    a, noise, n = 0.8, 0.5, 400_000
    g = torch.Generator().manual_seed(0)
    x = torch.full((n, 1, 1, 1), 0.7, dtype=torch.float64)
    total = a**2 + noise**2
    mean, var = a * x / total + off, torch.full_like(x, noise**2 / total)
    z = mean + var.sqrt() * torch.randn(n, 1, 1, 1, generator=g, dtype=torch.float64)
    values = negative_elbo(x, a * z, mean, var.log(), noise)
    error = values.std().item() / math.sqrt(n)
    truth = 0.7**2 / (2 * total) + 0.5 * math.log(2 * math.pi * total)
    gap = off**2 / (2 * noise**2 / total)
    assert values.mean().item() == pytest.approx(truth + gap, abs=4 * error)
    assert error < 0.005


def test_the_bound_sums_over_features_and_the_posterior_of_the_prior_costs_nothing():
    x = torch.zeros(3, 2, 4, 4)
    zero = torch.zeros(3, 4, 2, 2)
    value = negative_elbo(x, x, zero, zero, 1.0)
    torch.testing.assert_close(value, torch.full((3,), 32 * 0.5 * math.log(2 * math.pi)))
    torch.testing.assert_close(negative_elbo(x, x, zero + 1, zero, 1.0) - value, torch.full((3,), 8.0))


def random_latents() -> Latents:
    torch.manual_seed(0)
    about = {"kind": "kl", "shape": [1, 8, 8], "config": {"channels": 3, "width": 8}}
    return fitted(KLVAE((1, 8, 8), autoencoder.Config(channels=3, width=8)), about, digits().x[:200])


def test_latents_have_unit_variance_and_decode_passes_gradients():
    space = random_latents()
    z = space.encode(digits().x[:200])
    assert z.shape == (200, 3, 4, 4) == (200, *space.latent((1, 8, 8)))
    assert (z.mean().item(), z.std().item()) == pytest.approx((0, 1), abs=1e-4)
    z = z[:2].clone().requires_grad_()
    pixels = space.decode(z)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    (gradient,) = torch.autograd.grad(pixels.sum(), z)
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in space.module.parameters())


def test_saved_and_read_back_it_is_the_same_and_damage_is_noticed(tmp_path):
    space, x = random_latents(), digits().x[:4]
    pretrain_autoencoder.save(tmp_path / "ae", space)
    back = pretrain_autoencoder.load(tmp_path / "ae")
    assert torch.equal(back.encode(x), space.encode(x))
    assert torch.equal(back.decode(back.encode(x)), space.decode(space.encode(x)))
    blob = bytearray((tmp_path / "ae" / "space.safetensors").read_bytes())
    blob[-1] ^= 1
    (tmp_path / "ae" / "space.safetensors").write_bytes(blob)
    with pytest.raises(ConfigError, match="damaged"):
        pretrain_autoencoder.load(tmp_path / "ae")
    with pytest.raises(ConfigError, match="pretrain-autoencoder"):
        pretrain_autoencoder.load(tmp_path)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_an_autoencoder_of_diffusers(shift, tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=2, block_out_channels=(8,), norm_num_groups=4, sample_size=8,
        scaling_factor=0.4, shift_factor=shift,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    space = pretrain_autoencoder.load(tmp_path / "vae")
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        theirs = (model.encode(x).latent_dist.mode() - (shift or 0)) * 0.4
        pixels = model.decode(theirs / 0.4 + (shift or 0)).sample
    torch.testing.assert_close(space.encode(x), theirs, **ROUNDING)
    torch.testing.assert_close(space.decode(theirs), to_pixels(pixels), **ROUNDING)
    again = autoencoder.build(json.loads(json.dumps(space.about)))
    again.module.load_state_dict(space.module.state_dict())
    torch.testing.assert_close(again.encode(x), theirs, **ROUNDING)
    with pytest.raises(ConfigError, match="AutoencoderKL"):
        from_diffusers(str(tmp_path))
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"latents_std": [1.0, 2.0]}))
    with pytest.raises(ConfigError, match="latents_std"):
        pretrain_autoencoder.load(tmp_path / "vae")


def test_samples_that_an_autoencoder_of_diffusers_cannot_bring_back_are_refused(tmp_path):
    from diffusers import AutoencoderKL

    two = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    model = AutoencoderKL(3, 3, *two, block_out_channels=(8, 8), latent_channels=2, norm_num_groups=4)
    model.save_pretrained(tmp_path / "vae")
    base = Base(autoencoder=str(tmp_path / "vae"))
    for shape, fits in (((3, 8, 8), True), ((1, 8, 8), False), ((3, 9, 8), False), ((2, 8, 8), False)):
        data = Dataset(torch.zeros(2, *shape), torch.tensor([0, 1]), ("a", "b"))
        if fits:
            assert card_of(base, data).shape == shape
        else:
            with pytest.raises(ConfigError, match="does not bring samples"):
                card_of(base, data)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "rlfusion-autoencoder-1"}', '{"format": 1}', "{}"])
def test_a_damaged_description_is_refused(text, tmp_path):
    pretrain_autoencoder.save(tmp_path, random_latents())
    (tmp_path / "autoencoder.json").write_text(text)
    with pytest.raises(ConfigError, match=r"autoencoder\.json"):
        pretrain_autoencoder.load(tmp_path)
    space = random_latents()
    space.about["config"]["no such"] = 1
    pretrain_autoencoder.save(tmp_path, space)
    with pytest.raises(ConfigError, match="no such"):
        pretrain_autoencoder.load(tmp_path)


def test_building_touches_no_other_draw():
    about = random_latents().about
    state = torch.get_rng_state()
    autoencoder.build(about)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmented_samples_are_encoded_step_by_step():
    data, space = digits(), random_latents()
    config = models.Config("ResidualMLP(width=16, depth=1)")
    denoiser = models.build(models.Card(config, data.shape, data.names, autoencoder=space.about))
    denoiser.space = space
    learner = pretrain.Learner(denoiser, data, pretrain.Config(augment="Augment(flip=1.0)", batch=8))
    draw = learner.draw(3)
    torch.testing.assert_close(draw.x0, space.encode(data.x[draw.index].flip(3)), **ROUNDING)
    plain = pretrain.Learner(denoiser, data, pretrain.Config(batch=8)).draw(3)
    torch.testing.assert_close(plain.x0, space.encode(data.x[plain.index]), **ROUNDING)
    assert torch.equal(plain.index, draw.index)


def test_the_cache_knows_the_scale_of_the_latents(tmp_path):
    space, keys = random_latents(), []
    for scale in (1.0, 2.0):
        space.about["scale"] = scale
        pretrain_autoencoder.save(tmp_path / "ae", space)
        keys.append(_digest(Base(autoencoder=str(tmp_path / "ae")), digits()))
    assert keys[0] != keys[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, with_classifiers):
    """A root with an autoencoder and a model in its latents."""
    cwd = tmp_path_factory.mktemp("latent")
    with_classifiers(cwd / "runs")
    made = rlfusion(cwd, "pretrain-autoencoder", "--name", "ae", *QUICK)
    assert made.code == 0, made.err
    trained = rlfusion(cwd, "pretrain", "--autoencoder", "runs/ae", "--objective", "v", "--name", "it", *MODEL)
    assert trained.code == 0, trained.err
    return cwd


def test_training_an_autoencoder_brings_its_samples_back(folder):
    result = json.loads((folder / "runs" / "ae" / "evaluation.json").read_text())
    assert result["error"] < 0.2
    assert result["latent_std"] == pytest.approx(1, abs=0.1)
    assert (folder / "runs" / "ae" / "samples" / "reconstructions.png").is_file()


def test_a_model_carries_its_autoencoder(folder, tmp_path):
    shutil.copytree(folder / "runs" / "it" / "model", tmp_path / "alone")
    denoiser, card = models.load(tmp_path / "alone")
    assert card.shape == (1, 8, 8)
    assert denoiser.net.shape == (4, 4, 4) == denoiser.space.latent(card.shape)
    space = pretrain_autoencoder.load(folder / "runs" / "ae")
    x = digits().x[:5]
    assert torch.equal(denoiser.space.encode(x), space.encode(x))
    with pytest.raises(ConfigError, match="latents"):
        require_bound(Policy(denoiser, DDIM(1.0)), torch.tensor([1.0, 0.5, 0.0]).double(), digits())
    (tmp_path / "alone" / "space.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"space\.safetensors"):
        models.load(tmp_path / "alone")


@pytest.mark.parametrize("words", [("sample", "--count", 10), ("evaluate", "--evaluation.samples", 60)])
def test_other_commands_decode(words, folder):
    said = rlfusion(folder, words[0], "--checkpoint", "runs/it", *words[1:])
    assert said.code == 0, said.err


@pytest.mark.alone
@pytest.mark.parametrize("workers", [0, 1])
def test_fine_tuning_in_latents_is_rewarded_for_pixels(workers, folder):
    more = ("--base", "runs/it", "--reward", "ink", "--name", f"tuned{workers}", "--rollout.workers", workers)
    said = rlfusion(folder, "finetune", *TINY, *more, "--updates", 2)
    assert said.code == 0, said.err
    mine = models.load(folder / "runs" / f"tuned{workers}")[0]
    assert mine.net.shape == (4, 4, 4)
    first = folder / "runs" / "tuned0" / "model" / "weights.safetensors"
    assert first.read_bytes() == (folder / "runs" / f"tuned{workers}" / "model" / "weights.safetensors").read_bytes()


def test_a_stopped_training_is_code_75_and_goes_on_to_the_same_bits(folder, tmp_path):
    process = Process(tmp_path, "pretrain-autoencoder", "--name", "ae", *QUICK)
    stopped = process.once((tmp_path / "runs" / "ae" / "checkpoints").exists, signal.SIGTERM).wait()
    assert stopped.code == 75, stopped.err
    assert "--resume" in stopped.err
    assert rlfusion(tmp_path, "pretrain-autoencoder", "--resume", "runs/ae").code == 0
    name = "runs/ae/autoencoder/space.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_what_does_not_fit_is_refused(folder, tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((60, 12, 12), np.uint8), labels=np.arange(60) % 2)
    said = rlfusion(folder, "pretrain", "--autoencoder", "runs/ae", "--data", tmp_path / "d.npz", *MODEL)
    assert said.code == 2
    assert "(1, 8, 8)" in said.err
    assert rlfusion(folder, "pretrain", "--autoencoder", "nowhere", *MODEL).code == 2
    halved = rlfusion(folder, "pretrain-autoencoder", "--model.halvings", 4)
    assert halved.code == 2
    assert "halvings = 4" in halved.err


def test_pixels_are_their_own_latents():
    data = digits()
    denoiser = models.build(models.Card(models.Config("ResidualMLP(width=16, depth=1)"), data.shape, data.names))
    assert encoded(data, denoiser.space) is data
    assert isinstance(denoiser.net, nn.Module)
