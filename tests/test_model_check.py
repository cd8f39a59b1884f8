"""``rlfusion check-model``: what holds on a sound model, and that each fault is found by its own row."""

from dataclasses import replace

import pytest
import torch
from test_pipelines import PROMPTS, about
from torch import nn

from rlfusion import models, pipelines
from rlfusion.chain import NARROW, Chain, narrow
from rlfusion.cli import main
from rlfusion.denoiser import Denoiser
from rlfusion.kernel import DDIM
from rlfusion.model_check import CHECKS, CheckModel, Trial
from rlfusion.policy import Policy
from rlfusion.sampling import chain_noise
from rlfusion.schedule import DDPM

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
    assert "read as 'eps'" in CHECKS["kind"](trial(Exact(), "v")).said


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
    assert (row.verdict, row.said.count(",")) == ("ok", 19)


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
