"""Guidance against closed forms and diffusers: weight, scale, negative conditions, interval, rescale; one call each."""

import numpy as np
import oracles
import pytest
import torch
from diffusers import QwenImagePipeline
from diffusers.guiders.guider_utils import rescale_noise_cfg
from processes import rlfusion
from tiny_runs import TINY
from torch import nn

from rlfusion.agents.ddpo import Config, Learner
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser, Guided
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.parameterization import target
from rlfusion.diffusion.schedule import DDPM, Cosine, level
from rlfusion.models.pipelines import qwen_image
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rollout import Task, plan, run_item

T = torch.tensor(0.4, dtype=torch.float64)
NULL = torch.tensor([2])
CLASSES = [oracles.Mixture.scalar([1.0], [m], [v]) for m, v in ((1.0, 0.25), (-0.5, 0.5))]
BOTH = oracles.Mixture.scalar([0.5, 0.5], [1.0, -0.5], [0.25, 0.5])
LAWS = [*CLASSES, BOTH]


class Exact(nn.Module):
    """The exact eps of each class, and of both together for label 2, counting its rows."""

    def __init__(self, schedule) -> None:
        super().__init__()
        self.schedule, self.rows = schedule, []

    def forward(self, x, t, cond):
        self.rows.append(len(x))
        l = self.schedule(t.double())
        rows = zip(x.numpy(), l.alpha, l.sigma, cond)
        return torch.from_numpy(np.stack([LAWS[int(c)].eps(row[None], float(a), float(b))[0] for row, a, b, c in rows]))


def exact() -> Denoiser:
    return Denoiser(Exact(DDPM()), DDPM(), "eps")


def random_net(kind: str) -> Denoiser:
    torch.manual_seed(0)
    net = ResidualMLP((1, 4, 4), 2, width=16, depth=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return Denoiser(net, DDPM(), kind).double()


@pytest.mark.parametrize("w", [0.5, 3.0, -0.5])
def test_the_guided_score_is_that_of_the_powered_density(w):
    """grad log of p_c^(1 + w) p_0^(-w), by finite differences of the log-densities."""
    x, label = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], torch.zeros(9, dtype=torch.int64)
    l = level(DDPM(), T, x)
    a, b = float(l.alpha), float(l.sigma)
    score = -Guided(exact(), w, NULL)(x, T, label).eps / b

    def log_density(at):
        return (1 + w) * CLASSES[0].diffuse(a, b).log_density(at) - w * BOTH.diffuse(a, b).log_density(at)

    h = 1e-5
    truth = (log_density(x.numpy() + h) - log_density(x.numpy() - h)) / (2 * h)
    np.testing.assert_allclose(score.numpy()[:, 0], truth, rtol=1e-6, atol=1e-8)


def test_a_negative_class_takes_the_place_of_no_class():
    x, label = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], torch.zeros(5, dtype=torch.int64)
    mine, other = (exact()(x, T, label + c).eps for c in (0, 1))
    policy = Chain(guidance=2.0, negative="b").policy(exact(), ("a", "b"))
    torch.testing.assert_close(policy.denoiser(x, T, label).eps, 3 * mine - 2 * other)


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_scale_and_rescale_are_those_of_diffusers(kind, rescale):
    denoiser = random_net(kind)
    g = torch.Generator().manual_seed(1)
    x, label = torch.randn(6, 1, 4, 4, generator=g, dtype=torch.float64), torch.arange(6) % 2
    chain = Chain(guidance_scale=4.5, guidance_rescale=rescale)
    guided = chain.policy(denoiser, ("a", "b")).denoiser(x, T, label)
    text, uncond = (denoiser.answer(x, T, c) for c in (label, torch.full_like(label, 2)))
    theirs = uncond + 4.5 * (text - uncond)
    theirs = rescale_noise_cfg(theirs, text, guidance_rescale=rescale) if rescale else theirs
    ours = target(kind, guided.x0, guided.eps, level(DDPM(), T, x))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_weight_and_scale_are_one_apart():
    assert Chain(guidance_scale=4.5).weight == Chain(guidance=3.5).weight == 3.5
    assert Chain(guidance_scale=1.0).weight == Chain().weight == 0.0


@pytest.mark.parametrize(("t", "guided"), [(0.3, True), (0.5, True), (0.2999, False), (0.5001, False)])
def test_the_interval_holds_its_ends_and_costs_nothing_outside(t, guided):
    denoiser = exact()
    at = torch.tensor(t, dtype=torch.float64)
    x, label = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None], torch.zeros(5, dtype=torch.int64)
    plain = denoiser(x, at, label).eps
    got = Guided(denoiser, 2.0, NULL, low=0.3, high=0.5)(x, at, label).eps
    assert denoiser.net.rows == [5, 10 if guided else 5]
    assert torch.equal(got, plain) != guided


@pytest.mark.parametrize("rescale", [0.0, 0.6])
def test_rows_of_different_times_are_each_guided_or_not(rescale):
    """One call: the batch, and once more the rows inside; each row as if it were alone."""
    denoiser = random_net("v")
    guided = Guided(denoiser, 2.0, NULL, rescale, low=0.3, high=0.5)
    g = torch.Generator().manual_seed(1)
    x, label = torch.randn(4, 1, 4, 4, generator=g, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    times = torch.tensor([0.1, 0.3, 0.4, 0.9], dtype=torch.float64)
    seen = []
    denoiser.net.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    together = guided(x, times, label)
    assert seen == [6]
    for i in range(4):
        alone = guided(x[i : i + 1], times[i], label[i : i + 1])
        torch.testing.assert_close(together.x0[i : i + 1], alone.x0)
        torch.testing.assert_close(together.eps[i : i + 1], alone.eps)


def limited(y_c: torch.Tensor, y_0: torch.Tensor, w: float) -> torch.Tensor:
    """A mixture that is not affine: a fifth of the way at most, feature by feature."""
    return y_c + (w * (y_c - y_0)).clamp(-0.2, 0.2)


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_a_mixture_of_the_models_own_is_made_of_what_its_network_answers(kind):
    """In the interval alone, with its rescale after it; the affine one is Eq. (1)."""
    denoiser = random_net(kind)
    g = torch.Generator().manual_seed(1)
    x, label = torch.randn(4, 1, 4, 4, generator=g, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    times = torch.tensor([0.1, 0.3, 0.4, 0.9], dtype=torch.float64)
    l = level(DDPM(), times, x)
    y_c, y_0 = (denoiser.answer(x, times, c) for c in (label, torch.full_like(label, 2)))
    inside = ((times >= 0.3) & (times <= 0.5))[:, None, None, None]
    for rescale in (0.0, 0.7):
        made = Guided(denoiser, 2.0, NULL, rescale, 0.3, 0.5, limited)(x, times, label)
        mixed = limited(y_c, y_0, 2.0)
        mixed = rescale_noise_cfg(mixed, y_c, guidance_rescale=rescale) if rescale else mixed
        expected = torch.where(inside, mixed, y_c)
        torch.testing.assert_close(target(kind, made.x0, made.eps, l), expected, rtol=1e-9, atol=1e-9)
    affine = Guided(denoiser, 2.0, NULL, mix=lambda c, o, w: (1 + w) * c - w * o)(x, times, label)
    torch.testing.assert_close(affine.x0, Guided(denoiser, 2.0, NULL)(x, times, label).x0, rtol=1e-9, atol=1e-9)


def test_qwen_image_mixes_as_its_pipeline_does_and_its_gradient_is_exact():
    """The lines of the pipeline's call on its own packed tokens; finite differences."""
    g = torch.Generator().manual_seed(0)
    y_c, y_0 = (torch.randn(2, 4, 4, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    text, negative = (QwenImagePipeline._pack_latents(y, 2, 4, 4, 6) for y in (y_c, y_0))
    comb = negative + 4.0 * (text - negative)
    theirs = comb * (torch.norm(text, dim=-1, keepdim=True) / torch.norm(comb, dim=-1, keepdim=True))
    theirs = QwenImagePipeline._unpack_latents(theirs, 4, 6, 1)[:, :, 0]
    torch.testing.assert_close(qwen_image.mix(y_c, y_0, 3.0), theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: qwen_image.mix(a, b, 3.0), (y_c, y_0))
    torch.testing.assert_close(qwen_image.mix(y_c, y_0, 0.0), y_c)


CHAINS = [
    Chain(steps=5, guidance=1.5),
    Chain(steps=5, guidance_scale=2.5, guidance_rescale=0.7),
    Chain(steps=5, guidance=1.5, guidance_low=0.3, guidance_high=0.7),
    Chain(steps=5, guidance=1.5, negative="b"),
]


@pytest.mark.parametrize(
    "chain", CHAINS, ids=lambda c: f"{c.weight}-{c.guidance_rescale}-{c.guidance_low}-{c.negative}"
)
@pytest.mark.parametrize("mix", [None, limited])
def test_the_ratio_is_one_at_the_acting_weights(chain, mix):
    """The learner merges steps of all times into one call; the rollout makes one a step."""
    torch.manual_seed(0)
    net = ResidualMLP((1, 4, 4), 2, width=16, depth=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    policy = chain.policy(Denoiser(net, Cosine(), "v"), ("a", "b"))
    policy.denoiser.mix = mix
    reward = lambda x, c: x.flatten(1).mean(1)  # noqa: E731
    task = Task(policy, TimeGrid(5), (1, 4, 4), torch.arange(2), lambda x: x.clamp(0, 1), reward, "mean")
    batch = run_item(task, plan(0, 0, 2, 8, 16, 2, 0)[0])
    assert Learner(policy, task.times, Config()).preflight(batch)["log_ratio_max"] < 1e-4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance": 1.0, "guidance_scale": 2.0}, "guidance_scale = 2.0.*one of the two"),
        ({"negative": "a"}, "negative = a: there is no guidance"),
        ({"guidance_scale": 1.0, "guidance_rescale": 0.5}, "guidance_rescale = 0.5: there is no guidance"),
        ({"guidance_low": 0.1}, "guidance_low = 0.1: there is no guidance"),
    ],
)
def test_settings_that_contradict_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Chain(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"guidance_rescale": 1.5}, "guidance_rescale = 1.5"),
        ({"guidance_low": 0.6, "guidance_high": 0.5}, "0.6, 0.5"),
        ({"negative": "aa"}, "'aa'.*did you mean 'a'"),
    ],
)
def test_values_that_cannot_be_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Chain(guidance=1.0, **settings).policy(exact(), ("a", "b"))


def test_a_guided_chain_goes_through_the_command_line(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    flags = ("--chain.guidance_scale", 2, "--chain.guidance_rescale", 0.5, "--chain.negative", "3", "--name", "it")
    said = rlfusion(tmp_path, "finetune", *TINY, *flags)
    assert said.code == 0, said.err
    assert "guidance_scale: 2.0" in (tmp_path / "runs" / "it" / "config.yaml").read_text()
    assert rlfusion(tmp_path, "sample", "--checkpoint", "runs/it", "--count", 10).code == 0
    refused = rlfusion(tmp_path, "finetune", *TINY, "--chain.guidance", 1, "--chain.negative", "three")
    assert refused.code == 2
    assert "'three'" in refused.err
