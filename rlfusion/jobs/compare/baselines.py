"""What no training at all can do for a reward: the base model, the best of N of its samples, stronger guidance.

Best of N asks for N rewards a sample each time that it samples; a fine-tuned model asks for none.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.jobs.measure import Judged, Unjudged, draw
from rlfusion.rewards import Reward, score, valid

BASE = "base"
Measured = dict[str, float]
"""What the report and the reward say of some samples, by name."""


def gain(values: Measured, base: Measured) -> float:
    """How far the reward is above the base's, in its standard deviations."""
    return (values["reward"] - base["reward"]) / max(base["reward_std"], 1e-12)


def diversity(values: Measured, base: Measured) -> float:
    """The diversity within a prompt beside the base's, of a model without a judge."""
    return values["diversity"] / max(base["diversity"], 1e-12)


def baselines(
    denoiser: Denoiser,
    chain: Chain,
    judged: Judged | Unjudged,
    reward: Reward,
    samples: int,
    best_of: list[int],
    guidance: list[float],
    max_failed: float | None = None,
) -> Iterator[tuple[str, Measured | str]]:
    """(name, what ``judged`` and the reward say) of each baseline, on ``samples`` samples of fixed seeds; of guidance
    that the model does not know, why.

    With ``max_failed`` up to that share of the rewards may fail: such a sample is not the best, and not in the mean.
    """
    device = next(denoiser.parameters()).device
    label = torch.arange(samples, device=device) % judged.classes
    yield BASE, _measured(_draw(denoiser, chain, judged, label, 0), label, judged, reward, max_failed)
    for n in best_of:
        draws = torch.stack([_draw(denoiser, chain, judged, label, seed) for seed in range(n)])
        values = torch.stack([score(reward, x, label, "reward", max_failed is not None).detach() for x in draws])
        chosen = draws[values.nan_to_num(nan=-math.inf).argmax(0), torch.arange(samples, device=device)]
        yield f"best of {n}", _measured(chosen, label, judged, reward, max_failed)
    for weight in guidance:
        stronger = replace(chain, guidance=weight, guidance_scale=None)
        try:
            drawn = _draw(denoiser, stronger, judged, label, 0)
        except ConfigError as error:
            yield f"guidance {weight:g}", f"refused: {error}"
            continue
        yield f"guidance {weight:g}", _measured(drawn, label, judged, reward, max_failed)


def _draw(denoiser: Denoiser, chain: Chain, judged: Judged | Unjudged, label: Tensor, seed: int) -> Tensor:
    policy = chain.policy(denoiser, judged.names)
    return draw(policy, chain.times(denoiser), label, judged.shape, seed, "baseline")


@torch.no_grad()
def _measured(
    samples: Tensor, label: Tensor, judged: Judged | Unjudged, reward: Reward, max_failed: float | None
) -> Measured:
    found = judged.report(samples, label)
    value = score(reward, samples, label, "reward", max_failed is not None)
    if max_failed is not None:
        value = value[valid(value, "reward", max_failed)[0]]
    return {"reward": value.mean().item(), "reward_std": value.std(correction=0).item(), **found}
