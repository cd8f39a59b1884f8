"""Work items: a step's samples cut into pure functions of (configuration, weights).

    (1)  prompts of iteration n: rounds of a keyed permutation of 0..P-1, so that none comes twice before each came once
    (2)  samples 0..N-1, N = prompts_per_step * samples_per_prompt, prompt by prompt; sample i has the noise stream
         (seed, "rollout", n, i), whatever item, worker or batch it falls in
    (3)  items are consecutive runs of ``item_size`` samples; the last may be shorter

All of it is in global units: neither the number of workers nor their order enters.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import normals, stream
from rlfusion.diffusion.sampling import chain_noise


@dataclass(frozen=True)
class WorkItem:
    """The samples first..first+len-1 of an iteration, to be drawn under the weights ``version``.

    Attributes:
        seed: of the run.
        iteration: which rollout of the run.
        index: which item of the rollout.
        first: the number of its first sample in the rollout.
        groups: the prompt of each sample.
        version: the version of the weights that shall act.
    """

    seed: int
    iteration: int
    index: int
    first: int
    groups: tuple[int, ...]
    version: int

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        last = self.first + len(self) - 1
        return f"item {self.index} of iteration {self.iteration} (samples {self.first}..{last}, weights {self.version})"

    @property
    def samples(self) -> range:
        """The numbers of the samples in the rollout, which key their noise."""
        return range(self.first, self.first + len(self))

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict; ``from_json`` reads it back."""
        return vars(self) | {"groups": list(self.groups)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        return cls(**record | {"groups": tuple(record["groups"])})


def rollout_noise(seed: int, iteration: int, samples: Iterable[int], steps: int, shape: tuple[int, ...]) -> Tensor:
    """The noise (B, K+1, *shape) of these samples' walks of ``steps`` steps, Eq. (2), as ``sampling.walk`` takes it."""
    return chain_noise((seed, "rollout", iteration), samples, steps, shape)


def noises(item: WorkItem, columns: int, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The first ``columns`` (B, *shape) of ``rollout_noise`` of an item, one after another, drawn as they are taken."""
    return normals((item.seed, "rollout", item.iteration, "chain"), item.samples, columns, shape)


def choose_prompts(seed: int, iteration: int, count: int, total: int) -> list[int]:
    """Eq. (1): ``count`` prompts of 0..total-1."""
    rounds = range(-(-count // total))
    order = [stream(seed, "prompts", iteration, r).permutation(total) for r in rounds]
    return np.concatenate(order)[:count].tolist()


def plan(
    seed: int,
    iteration: int,
    prompts_per_step: int,
    samples_per_prompt: int,
    item_size: int,
    prompts_total: int,
    version: int,
) -> list[WorkItem]:
    """The work items of one iteration, Eq. (1) to (3). ``prompts_total`` is P, 1 for an unconditional model.

    Raises:
        ConfigError: a size below 1.
    """
    sizes = {
        "prompts_per_step": prompts_per_step,
        "samples_per_prompt": samples_per_prompt,
        "item_size": item_size,
        "prompts_total": prompts_total,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name} = {value}: expected at least 1")
    prompts = choose_prompts(seed, iteration, prompts_per_step, prompts_total)
    groups = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    firsts = range(0, len(groups), item_size)
    return [
        WorkItem(seed, iteration, index, first, tuple(groups[first : first + item_size]), version)
        for index, first in enumerate(firsts)
    ]


def lag_at(version: int, lag: int, slowed: Sequence[int] = ()) -> int:
    """How many rollouts may be ahead of the weights ``version``: one less from each version in ``slowed`` on."""
    return max(0, lag - sum(since <= version for since in slowed))


def version_for(step: int, lag: int, checkpoint_every: int, slowed: Sequence[int] = ()) -> int:
    """The version of the weights that acts in step s >= 0, of weights numbered by the updates they have had:

    max(c, s - lag) with c the last checkpointed version, the largest multiple of ``checkpoint_every`` <= s (0 where
    there are no checkpoints). A run resumed at c therefore needs no weights older than c, and repeats what the
    uninterrupted run did. lag = 0 is on-policy. Where the lag was shortened on the way (``lag_at``), it is the first
    version from c on that is at most its own lag behind.

    Raises:
        ConfigError: a negative number.
    """
    if min(step, lag, checkpoint_every) < 0:
        raise ConfigError(f"step = {step}, lag = {lag}, checkpoint_every = {checkpoint_every}: expected numbers >= 0")
    checkpoint = step // checkpoint_every * checkpoint_every if checkpoint_every else 0
    behind = range(max(checkpoint, step - lag), step + 1)
    return next(version for version in behind if version + lag_at(version, lag, slowed) >= step)
