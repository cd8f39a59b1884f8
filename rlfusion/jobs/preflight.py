"""Checks of a fine-tuning job on a small batch, before any training: what would fail quietly is refused loudly.

(1)  no two walks begin with the same noise
(2)  every reward is finite (a reward that is not is refused where it is scored)
(3)  the learner's own: the importance ratio is 1 at the acting weights, or the reward has a gradient
"""

from dataclasses import replace

import torch

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import Weights
from rlfusion.diffusion.chain import narrow
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.parts import TaskSpec
from rlfusion.jobs.scoring import scored
from rlfusion.models.lora_dropout import dropped
from rlfusion.rl.agent import AgentLearner, wrong_metrics
from rlfusion.rl.reward_gradient import PREFLIGHT
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.ranks import current

SAMPLES = 64


def try_out(spec: TaskSpec, learner: AgentLearner, collector: Collector, weights: Weights) -> list[str]:
    """Collect a few walks under the learner's present ``weights``, and check them: what is to be told, line by line.
    Each further rank collects the walks of one prompt: where it asks the reward itself, one that is not there on its
    node is found now.

    Raises:
        NumericalError, ConfigError: a check fails.
    """
    item, each = collector.items(PREFLIGHT, weights.version)[0], collector.spec.rollout.samples_per_prompt
    small = replace(item, groups=item.groups[: max(1, SAMPLES // each) * each])  # whole prompts
    others = [replace(item, groups=item.groups[:each]) for _ in range(current().count - 1)]
    walks = concatenate(collector.backend.collect([small, *others], weights)).take(torch.arange(len(small)))
    batch, _ = scored(walks.to(collector.device), spec.rewards)
    found, told = preflight(learner, batch), []
    if found.get("reward_std") == 0:
        told.append("warning: all rewards of the first walks are equal; while they are, there is nothing to learn from")
    if spec.rollout.path and (message := narrow(spec.chain, learner.policy.denoiser)):
        told.append(f"warning: {message}, and the guard may stop the run")
    return [*told, "preflight: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items())]


def preflight(learner: AgentLearner, batch: Trajectory) -> dict[str, float]:
    """Run the checks on a trajectory of the learner's present weights.

    Returns:
        What the learner found; reward and reward_std of the batch, where it was scored.

    Raises:
        NumericalError, ConfigError: a check fails.
    """
    with dropped(learner.policy, learner.seed, PREFLIGHT):
        found = learner.preflight(batch)
    if wrong := wrong_metrics(found, ()):
        raise ConfigError(f"the learner's preflight: {', '.join(wrong)} (docs/doors.md)")
    starts = batch.x[:, 0].flatten(1)
    if len(starts.unique(dim=0)) != len(starts):
        raise ConfigError("two walks of one rollout begin with the same noise: their seeds are not distinct")
    if batch.reward is None:
        return found
    spread = batch.reward.std(correction=0).item()
    return found | {"reward": batch.reward.mean().item(), "reward_std": spread}
