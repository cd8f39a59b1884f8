"""``rlfusion check-model``: what holds on a sound model, and that each fault is found by its own row."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import schedulers
from tiny_pipelines import PROMPTS, SCALED, about
from torch import nn

from rlfusion import models
from rlfusion.cli.main import main
from rlfusion.config import CheckModel
from rlfusion.diffusion.chain import NARROW, Chain, narrow
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import chain_noise
from rlfusion.diffusion.schedule import DDPM
from rlfusion.jobs.check_model import CHECKS, Trial
from rlfusion.models import pipelines

SHAPE, MEANS = (1, 8, 8), (-0.5, 0.5)


class Exact(nn.Module):
    """eps_hat of data N(mean of the class, gain^2), exactly, at gain = 0.1."""

    def __init__(self):
        super().__init__()
        self.gain, self.means = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(MEANS))

    def forward(self, x, t, cond):
        l = DDPM()(t.double().reshape(-1, 1, 1, 1))
        alpha, sigma = l.alpha.float(), l.sigma.float()
        return sigma * (x - alpha * self.means[cond].reshape(-1, 1, 1, 1)) / ((alpha * self.gain) ** 2 + sigma**2)


def trial(net: nn.Module, kind: str = "eps") -> Trial:
    denoiser = Denoiser(net, DDPM(), kind)
    card = models.Card(models.Config(), SHAPE, ("dark", "bright"))
    chain = Chain(steps=20)
    times = chain.times(denoiser)
    noise = chain_noise((0, "test"), range(4), len(times) - 1, SHAPE)
    policy = chain.policy(denoiser, card.names)
    return Trial(CheckModel("it", chain=chain), card, denoiser, chain, policy, times, noise, torch.arange(4) % 2)


def verdicts(made: Trial) -> dict[str, str]:
    found = {}
    for name, check in CHECKS.items():
        finding = check(made)
        if finding is not None:
            found[name] = finding.verdict
    return found


def test_a_sound_model_passes():
    assert set(verdicts(trial(Exact())).values()) == {"ok"}
    assert "sampler" not in verdicts(trial(Exact()))  # which is of pipelines alone


class Deaf(Exact):
    def forward(self, x, t, cond):
        return super().forward(x, t, torch.zeros_like(cond)) + 0 * self.means.sum()


class Sociable(Exact):
    def forward(self, x, t, cond):
        y = super().forward(x, t, cond)
        return y - 0.1 * y.mean(0, keepdim=True)


class Cut(Exact):
    def forward(self, x, t, cond):
        return super().forward(x, t, cond).detach() + 0 * self.gain.detach() + x * 0


class Broken(Exact):
    def forward(self, x, t, cond):
        return super().forward(x, t, cond) / 0


@pytest.mark.parametrize(
    ("net", "kind", "row"),
    [(Deaf, "eps", "condition"), (Sociable, "eps", "batch"), (Broken, "eps", "answers"), (Exact, "v", "kind")],
)
def test_each_fault_has_its_row(net, kind, row):
    assert CHECKS[row](trial(net(), kind)).verdict == "FAILS"
    assert CHECKS[row](trial(Exact())).verdict == "ok"


def test_a_wrong_kind_is_told_the_right_one():
    assert "read as 'eps'" in CHECKS["kind"](trial(Exact(), "v")).message


def test_weights_without_a_gradient_are_found():
    with pytest.raises(RuntimeError, match="does not require grad"):
        CHECKS["gradient"](trial(Cut()))


def test_a_chain_without_noise_has_no_ratio():
    made = trial(Exact())
    chain = Chain(steps=20, kernel="DDIM(eta=0.0)")
    still = made._replace(chain=chain, policy=chain.policy(made.denoiser, made.card.names))
    assert CHECKS["ratio"](still).verdict == "note"


def test_steps_of_little_noise_are_named_with_the_setting_that_leaves_them_out(tiny_pipelines):
    """The published grid of Stable Diffusion ends with two; elsewhere there are none."""
    denoiser = pipelines.build(about(tiny_pipelines["sd"]), PROMPTS)
    published = Chain(steps=20, spacing="model")
    said = narrow(published, denoiser)
    stds = Policy(denoiser, DDIM(1.0)).stds(published.times(denoiser)).tolist()
    assert f"19 of 20: {stds[18]:.3g}, 20 of 20: {stds[19]:.3g}" in said
    assert stds[19] < stds[18] < NARROW < stds[17]
    assert said.endswith("chain.spacing = trailing has no such step")
    assert narrow(replace(published, spacing="trailing"), denoiser) == ""
    assert narrow(replace(published, kernel="DDIM(eta=0.1)"), denoiser).endswith("have none")
    assert narrow(replace(published, kernel="DDIM(eta=0.0)"), denoiser) == ""
    row = CHECKS["noise"](trial(Exact()))
    assert (row.verdict, row.message.count(",")) == ("ok", 19)


@pytest.mark.parametrize(("name", "code", "failing"), [("flux", 0, ""), ("sd", 2, "fails: kind")])
def test_the_command_on_pipelines(name, code, failing, tiny_pipelines, capsys):
    """Random weights know nothing of noise: of the eps network that is found; a flow network's x_t itself helps."""
    arguments = ["--pipeline.prompts", "a red cat", "--pipeline.size", "16", "--count", "2", "--steps", "2"]
    assert main(["check-model", str(tiny_pipelines[name]), *arguments]) == code
    out, err = capsys.readouterr()
    assert failing in err
    for row in CHECKS:
        assert row in out
    assert out.count("FAILS") == (1 if failing else 0)


SOLVERS = {
    "pndm": lambda: schedulers.PNDMScheduler(**SCALED, set_alpha_to_one=False, steps_offset=1, skip_prk_steps=True),
    "dpm": lambda: schedulers.DPMSolverMultistepScheduler(**SCALED),
    "dpm, SDE": lambda: schedulers.DPMSolverMultistepScheduler(**SCALED, algorithm_type="sde-dpmsolver++"),
}


def pipeline_trial(folder, scheduler=None, **guidance) -> Trial:
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
        (folder / "model_index.json").write_text(json.dumps(index))
    card = models.Card(models.Config(), (3, 16, 16), tuple(PROMPTS), pipeline=about(folder))
    denoiser = pipelines.build(card.pipeline, PROMPTS)
    chain = Chain(steps=4, spacing="model", **{"guidance_scale": 3.0, **guidance})
    times, latent = chain.times(denoiser), denoiser.space.latent(card.shape)
    noise = chain_noise((0, "test"), range(2), len(times) - 1, latent)
    policy = chain.policy(denoiser, card.names)
    return Trial(CheckModel("it", chain=chain), card, denoiser, chain, policy, times, noise, torch.arange(2))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_of_several_steps_differs_and_is_told_from_a_fault(name, tiny_pipelines, tmp_path):
    """SD 1.5 is published with the first of them. The note has both distances; what is wrong fails all the same."""
    made = pipeline_trial(shutil.copytree(tiny_pipelines["sd"], tmp_path / "sd"), SOLVERS[name]())
    found = CHECKS["sampler"](made)
    assert found.verdict == "note", found
    assert f"first-order form of {type(SOLVERS[name]()).__name__}, a solver of several steps" in found.message
    same, apart = map(float, re.findall(r" by ([0-9.e-]+)", found.message))
    assert same <= 1e-4 < 1e-2 < apart
    own = made.denoiser.own
    sampling = own.sampling
    wrong = replace(sampling, times=lambda steps: sampling.times(steps) * 0.98)
    made.denoiser.own = replace(own, sampling=wrong)
    assert CHECKS["sampler"](made).verdict == "FAILS"


def test_one_step_schedulers_have_no_such_excuse(tiny_pipelines):
    made = pipeline_trial(tiny_pipelines["sd"])
    assert CHECKS["sampler"](made).verdict == "ok"
    made.denoiser.schedule = DDPM()
    assert CHECKS["sampler"](made).verdict == "FAILS"


@pytest.mark.parametrize(
    ("guidance", "verdict", "said"),
    [
        ({"guidance_rescale": 0.7}, "ok", "differ by"),
        ({"guidance_scale": 0.0}, "ok", "differ by"),
        ({"guidance_scale": None, "guidance": -0.5}, "note", "acts above w = 0 alone"),
        ({"guidance_low": 0.2}, "note", "acts at all times"),
        ({"repeats": 1}, "ok", "differ by"),
    ],
)
def test_guidance_is_compared_where_the_pipeline_has_it(guidance, verdict, said, tiny_pipelines):
    found = CHECKS["sampler"](pipeline_trial(tiny_pipelines["sd"], **guidance))
    assert (found.verdict, said in found.message) == (verdict, True), found


@pytest.mark.parametrize(
    ("name", "guidance", "verdict", "said"),
    [
        ("sd", {}, "ok", "two answers: w = 2, a scale of 3"),
        ("sd", {"guidance_scale": 0.0}, "note", "guidance_scale = 0, and it acts above 1, as in diffusers"),
        ("lcm", {"guidance_scale": 0.0}, "ok", "the network reads it: w = -1, a scale of 0"),
    ],
)
def test_the_guidance_is_said(name, guidance, verdict, said, tiny_pipelines):
    found = CHECKS["guidance"](pipeline_trial(tiny_pipelines[name], **guidance))
    assert (found.verdict, said in found.message) == (verdict, True), found
