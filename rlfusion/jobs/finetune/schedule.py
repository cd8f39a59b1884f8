"""When a run is evaluated on its way, and on how many samples.

``evaluation.every auto`` follows from counts alone, so that the same updates are evaluated on any machine:

    samples on the way  <=  walks of all rollouts / 10

A sample costs a walk and a reward; a walk of a rollout costs these and its share of the updates, too. So neither the
calls of the network nor those of the reward are more than a tenth of the run's. Evaluations lie where the monitor looks
as well, which has the KL to the base model there. Fewer samples than before and after are the first of the same ones,
two of each prompt at least, without which it has no diversity.
"""

from dataclasses import dataclass

from rlfusion.config import Evaluation, Finetune

SHARE = 10
MOST = 9
"""Evaluations on the way: with more updates they lie further apart, and have more samples."""


@dataclass(frozen=True)
class Schedule:
    """An evaluation of ``samples`` samples after every ``every`` updates before the last; 0 for none."""

    every: int
    samples: int
    deterministic: bool = False
    """Whether these evaluations, too, have the figures of the deterministic sampler."""

    def due(self, done: int, total: int) -> bool:
        """Whether one is due after ``done`` of ``total`` updates, the last of which has one of its own."""
        return bool(self.every) and done % self.every == 0 and done < total


def schedule(config: Finetune, prompts: int) -> Schedule:
    """That of these settings, for a model of so many prompts."""
    told, rollout = config.evaluation, config.rollout
    if told.every != "auto":
        return Schedule(told.every, told.samples, told.deterministic)
    walks = config.updates * rollout.prompts * rollout.samples_per_prompt
    walks = min(walks, config.budget_queries or walks)
    if config.agent.traits().rewards == "none":
        return Schedule(0, 0)  # there is no walk of which these could be a tenth
    affordable = walks // SHARE
    fewest = max(Evaluation.FEWEST, min(2 * prompts, told.samples))
    step = config.monitor.every or 1
    for every in range(step, config.updates, step):
        count = (config.updates - 1) // every
        if count <= MOST and count * fewest <= affordable:
            return Schedule(every, min(told.samples, affordable // count))
    return Schedule(0, 0)
