"""The weights that a rollout acts under."""

import pytest
import torch

import rlfusion as rlf
from rlfusion.common.weights import Live, Weights
from rlfusion.jobs.collector import Collector


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1, 2, 2), 0.5))

    def forward(self, x, t, cond):
        return self.scale * x


def learned(**rollout) -> tuple[list[str], torch.Tensor]:
    """The kinds of weights under which walks were drawn, and what a few updates make of a model."""
    model = rlf.Model.of(rlf.Denoiser(Tiny(), rlf.Cosine(), "x0"), (1, 2, 2), chain={"steps": 2, "last_noise": 0.1})
    run = rlf.finetune(model, "ink", updates=3, rollout={"prompts": 1, "samples_per_prompt": 8, **rollout})
    kinds = []
    for _ in run:
        kinds += [type(weights).__name__ for weights in run._collector.published.values()]
    return kinds, run.policy.denoiser.net.scale.detach().clone()


def test_weights_that_are_copied_give_the_bits_of_weights_that_are_packed(monkeypatch):
    kinds, copied = learned()
    assert set(kinds) == {"Live"}
    monkeypatch.setattr(Collector, "acting", lambda self, policy, version: Weights.of(policy, version))
    kinds, packed = learned()
    assert set(kinds) == {"Weights"}
    assert torch.equal(copied, packed)
    assert not torch.equal(copied, torch.full((1, 2, 2), 0.5))


@pytest.mark.parametrize(("workers", "lag", "live"), [(0, 0, True), (0, 1, False), (2, 0, False), (2, 1, False)])
def test_weights_that_travel_or_wait_are_packed(workers, lag, live):
    spec = type("Spec", (), {"rollout": type("Rollout", (), {"workers": workers, "lag": lag})})
    collector = Collector(None, spec, None, 1, 0, torch.device("cpu"))
    policy = torch.nn.Linear(2, 2)
    weights = collector.acting(policy, 4)
    assert isinstance(weights, Live) == live
    policy.weight.data.zero_()
    other = torch.nn.Linear(2, 2)
    weights.load_into(other)
    assert bool((other.weight == 0).all()) == live
