"""Checks of a fine-tuning job on a small batch, before any training: what would fail quietly is refused loudly.

(1)  no two walks begin with the same noise, or end the same where those of a prompt begin with one
(2)  every reward is finite (a reward that is not is refused where it is scored)
(3)  the learner's own: the importance ratio is 1 at the acting weights, or the reward has a gradient
(4)  of a compiled network, whatever learns: its code with a graph, which updates call, and that without one, which
     rollouts call, give the steps of a walk the same log-probabilities, to within a tenth of the clip range
"""

from dataclasses import replace
from itertools import pairwise

import torch

from rlfusion.common.compiled import Compile
from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import normal
from rlfusion.common.tensors import map_cond
from rlfusion.common.weights import Weights
from rlfusion.diffusion.chain import NARROW, narrow
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.jobs.collector import Collector
from rlfusion.jobs.parts import TaskSpec
from rlfusion.jobs.scoring import scored
from rlfusion.models.lora_dropout import dropped
from rlfusion.rl.agent import AgentLearner, Clip, wrong_metrics
from rlfusion.rl.reward_gradient import PREFLIGHT
from rlfusion.rollout import Start
from rlfusion.rollout.trajectory import Trajectory, concatenate
from rlfusion.training.ranks import current

SAMPLES = 64
COMPILED = 8
"""Walks by which the codes of a compiled network are compared."""


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
    found, told = preflight(learner, batch, spec.rollout.start), []
    if spec.arithmetic.compile:
        found |= require_alike(learner.policy, batch, spec.clip, spec.arithmetic.compile)
    if found.get("reward_std") == 0:
        told.append("warning: all rewards of the first walks are equal; while they are, there is nothing to learn from")
    if spec.rollout.path and (message := narrow(spec.chain, learner.policy.denoiser)):
        told.append(f"warning: {message}, and the guard may stop the run")
    return [*told, "preflight: " + ", ".join(f"{name} {value:.3g}" for name, value in found.items())]


@torch.no_grad()
def require_alike(policy: Policy, batch: Trajectory, clip: Clip, how: Compile = True) -> dict[str, float]:
    """{"compiled_log_ratio_max": the largest |log ratio| of check (4)}, by walks of a few conditions of ``batch``. A
    step without noise has no density of its own: its mean is held to noise of ``NARROW``. ``how`` it is compiled is for
    the error.

    Raises:
        ConfigError: it is not below a tenth of the clip range.
    """
    rows, times, gap = min(len(batch), COMPILED), batch.times, torch.zeros(())
    cond = map_cond(lambda c: c[:rows], batch.cond)
    noise = normal(("compiled",), range(rows), (len(times), *batch.x.shape[2:])).to(batch.x.device)
    x = policy.prior_std(times) * noise[:, 0]
    steps = [*enumerate(pairwise(times))]
    for k, (t, s) in steps if len(steps) > 1 else 2 * steps:  # the second call of a kind is the first to be replayed
        acting = policy(Observation(x, t, s, cond))
        with torch.enable_grad():
            learned = policy(Observation(x, t, s, cond))
        std = acting.std if bool((acting.std > 0).all()) else torch.full_like(acting.std, NARROW)
        x = acting.sample(noise[:, k + 1])
        ratio = Gaussian(learned.mean.detach(), std).log_prob(x) - Gaussian(acting.mean, std).log_prob(x)
        gap = torch.maximum(gap, ratio.abs().max().cpu())
    found = gap.item() / (batch.features if clip.per_dim else 1)
    if not found < clip.range / 10:
        raise ConfigError(
            f"compile = {how}: compiled, the network answers rollouts and updates differently (max |log ratio| = "
            f"{found:.3g} at the acting weights, expected below a tenth of the clip range, {clip.range / 10:.3g}): "
            "expected compile false"
        )
    return {"compiled_log_ratio_max": found}


def preflight(learner: AgentLearner, batch: Trajectory, start: Start = "own") -> dict[str, float]:
    """Run the checks on a trajectory of the learner's present weights, whose walks begin so.

    Returns:
        What the learner found; reward and reward_std of the batch, where it was scored.

    Raises:
        NumericalError, ConfigError: a check fails.
    """
    with dropped(learner.policy, learner.seed, PREFLIGHT):
        found = learner.preflight(batch)
    if wrong := wrong_metrics(found, ()):
        raise ConfigError(f"the learner's preflight: {', '.join(wrong)} (docs/doors.md)")
    states = batch.x[:, 0 if start == "own" else -1].flatten(1)
    if len(states.unique(dim=0)) != len(states):
        if start == "prompt":
            raise ConfigError(
                "two walks of a prompt end the same: with start = prompt they have to take noise after it"
            )
        raise ConfigError("two walks of one rollout begin with the same noise: their seeds are not distinct")
    if batch.reward is None:
        return found
    spread = batch.reward.std(correction=0).item()
    return found | {"reward": batch.reward.mean().item(), "reward_std": spread}
