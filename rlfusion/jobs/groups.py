"""Whether a rollout holds whole groups: all samples of a prompt, for rewards that compare them."""

from rlfusion.common.errors import ConfigError
from rlfusion.config import Rollout
from rlfusion.jobs.parts import TaskSpec
from rlfusion.rewards import Reward, needs_groups


def require_whole_groups(r: Rollout, task: TaskSpec, agent: str, prompts: int, reward: Reward) -> None:
    """Refuse more prompts in a rollout than there are (of one condition alone a rollout may have any number of groups),
    and rollouts that would tear the groups of a reward that compares the samples of a prompt.

    Raises:
        ConfigError: so many prompts; or the agent scores sample by sample, a prompt has one sample, an item holds part
            of a prompt's samples, or a prompt comes twice in a rollout.
    """
    if r.prompts > prompts > 1:
        raise ConfigError(f"rollout.prompts = {r.prompts}: expected at most the {prompts} prompts that there are")
    if not needs_groups(reward):
        return
    what = f"reward {task.rewards.name!r} compares the samples of a prompt"
    if not task.rollout.end:
        raise ConfigError(f"agent = {agent}: it scores as it learns, sample by sample, and {what}")
    if r.samples_per_prompt < 2:
        raise ConfigError(f"samples_per_prompt = {r.samples_per_prompt}: {what}, expected 2 at least")
    if r.item % r.samples_per_prompt:
        near = max(1, round(r.item / r.samples_per_prompt)) * r.samples_per_prompt
        raise ConfigError(
            f"rollout.item = {r.item}: {what}, expected a multiple of samples_per_prompt = "
            f"{r.samples_per_prompt}, such as {near}"
        )
    if r.prompts > prompts:
        raise ConfigError(f"rollout.prompts = {r.prompts}: {what}, expected at most the {prompts} that there are")
