"""Whole runs whose updates take the rollout's own forward pass: resumed, broken off, and beside runs with two."""

import pytest
import torch
from interrupted_runs import outcome
from tiny_runs import TINY

import rlfusion as rlf
from rlfusion.cli.main import main
from rlfusion.finetuning import Run

FEW = {"chain": {"steps": 3}, "rollout": {"prompts": 2, "samples_per_prompt": 4, "item": 3}}
SETTINGS = ("--agent.fused", "true", "--agent.step_fraction", "0.7", "--agent.kl_loss", "0.1")


def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(tiny_root):
    begin = ["finetune", *map(str, TINY), *SETTINGS, "--reward", "ink", "--root", str(tiny_root), "--updates"]
    assert main([*begin, "4", "--name", "fused-whole"]) == 0
    assert main([*begin, "2", "--name", "fused-cut"]) == 0
    assert main(["finetune", "--resume", str(tiny_root / "fused-cut"), "--change", "updates=4"]) == 0
    whole, cut = (outcome(tiny_root / name) for name in ("fused-whole", "fused-cut"))
    assert whole["model/weights.safetensors"] == cut["model/weights.safetensors"]
    assert whole["after.png"] == cut["after.png"]


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))

    def forward(self, x, t, cond):
        return self.layers(torch.cat([x.flatten(1), t[:, None]], 1)).view_as(x)


def begun(reward, **agent) -> Run:
    denoiser = rlf.Denoiser(Net(), rlf.Cosine(), "x0")
    model = rlf.Model.of(denoiser, (1, 2, 2), 2, {"steps": 3, "last_noise": 0.1})
    return rlf.finetune(model, reward, agent={"name": "ddpo", "kl_loss": 0.1} | agent, updates=3, **FEW)


def bright(samples, cond):
    return samples.mean((1, 2, 3))


def weights(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def test_it_learns_what_a_run_with_a_second_pass_learns():
    fused, other = begun(bright, fused=True), begun(bright, epochs=1, updates_per_epoch=1)
    for one, two in zip(fused, other, strict=True):
        assert one.keys() == two.keys()
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(weights(fused), weights(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_update_that_is_cut_short_begins_again_with_the_same_bits(error, monkeypatch):
    whole, broken = begun(bright, fused=True), begun(bright, fused=True)
    list(whole)
    next(broken)
    step = broken._learner.optimization.step

    def cut(*of):
        monkeypatch.setattr(broken._learner.optimization, "step", step)
        raise error

    monkeypatch.setattr(broken._learner.optimization, "step", cut)  # after the one backward pass
    with pytest.raises(error):
        next(broken)
    list(broken)
    assert broken.updates == 3
    assert torch.equal(weights(whole), weights(broken))
