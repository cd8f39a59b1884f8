"""Baselines without training: the base model, the best of N of its samples, and stronger guidance.

Best of N asks for N rewards a sample each time that it samples; a fine-tuned model asks for none.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.evaluation import gains
from rlfusion.jobs.measure import Judged, Scored, Unjudged, draw
from rlfusion.rewards import score, valid

BASE = "base"
Measured = dict[str, float]
"""What the report and the reward say of some samples, by name."""


Keep = Callable[[str, Tensor, Tensor], None]
"""Takes the name of a baseline, and the prompts and rewards (N,) of its samples."""


def gain(values: Measured, base: Measured) -> float:
    """How far the reward is above the base's, in its standard deviations."""
    return gains.gain(values["reward"], base["reward"], base["reward_std"])


def diversity(values: Measured, base: Measured) -> float:
    """The diversity within a prompt beside the base's, of a model without a judge."""
    return values["diversity"] / max(base["diversity"], 1e-12)


class Tries(NamedTuple):
    """How many samples, of how many each the best, and with which guidance weights."""

    samples: int
    best_of: list[int]
    guidance: list[float]


def baselines(
    denoiser: Denoiser,
    chain: Chain,
    judged: Judged | Unjudged,
    scored: Scored,
    tries: Tries,
    keep: Keep = lambda name, label, reward: None,
) -> Iterator[tuple[str, Measured | str]]:
    """(name, what ``judged`` and the reward say) of each baseline, on the samples of the evaluation of a run of seed 0;
    of guidance that the model does not know, why. ``keep`` is given its name, and the prompts and rewards of samples.

    With ``scored.max_failed`` up to that share of the rewards may fail: such a sample is not the best, and not in the
    mean.
    """
    device = next(denoiser.parameters()).device
    (reward, name, max_failed), samples = scored, tries.samples
    label = torch.arange(samples, device=device) % judged.classes
    yield BASE, _measured(_draw(denoiser, chain, judged, label, 0), label, judged, scored, partial(keep, BASE))
    for n in tries.best_of:
        draws = torch.stack([_draw(denoiser, chain, judged, label, seed) for seed in range(n)])
        values = torch.stack([score(reward, x, label, name, max_failed is not None).detach() for x in draws])
        chosen = draws[values.nan_to_num(nan=-math.inf).argmax(0), torch.arange(samples, device=device)]
        name_of_n = f"best of {n}"
        yield name_of_n, _measured(chosen, label, judged, scored, partial(keep, name_of_n))
    for weight in tries.guidance:
        stronger = replace(chain, guidance=weight, guidance_scale=None)
        try:
            drawn = _draw(denoiser, stronger, judged, label, 0)
        except ConfigError as error:
            yield f"guidance {weight:g}", f"refused: {error}"
            continue
        guided = f"guidance {weight:g}"
        yield guided, _measured(drawn, label, judged, scored, partial(keep, guided))


def _draw(denoiser: Denoiser, chain: Chain, judged: Judged | Unjudged, label: Tensor, seed: int) -> Tensor:
    policy = chain.policy(denoiser, judged.names)
    return draw(policy, chain.times(denoiser), label, judged.shape, seed, "evaluation")


@torch.no_grad()
def _measured(
    samples: Tensor,
    label: Tensor,
    judged: Judged | Unjudged,
    scored: Scored,
    keep: Callable[[Tensor, Tensor], None],
) -> Measured:
    found = judged.report(samples, label)
    reward, name, max_failed = scored
    value = score(reward, samples, label, name, max_failed is not None)
    keep(label, value)
    if max_failed is not None:
        value = value[valid(value, name, max_failed)[0]]
    return {"reward": value.mean().item(), "reward_std": value.std(correction=0).item(), **found}
