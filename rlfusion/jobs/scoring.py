"""A rollout's rewards as the learner gets them: failed ones left out, several ones each normalised."""

from collections.abc import Mapping
from dataclasses import replace

from rlfusion.jobs.balance import Balance
from rlfusion.jobs.parts import RewardSpec
from rlfusion.rewards import labels, valid
from rlfusion.rollout.trajectory import Trajectory


def scored(
    batch: Trajectory, rewards: RewardSpec, balance: Balance | None = None, step: int = 0
) -> tuple[Trajectory, dict[str, float]]:
    """The walks whose reward did not fail, with the reward that is learned from, and what to log:

    of every named reward ``reward_NAME``, its mean, and where they are normalised ``share_NAME``, what of the advantage
    is its own; ``reward`` then is still the plain weighted sum, of calibrated rewards where they are calibrated.
    ``failed`` is the share of rewards that failed, and ``cached`` the share that was remembered. ``balance`` has what
    is known of the base, and the multipliers of this ``step``; without it there are none.

    Raises:
        RewardError: more than ``max_failed`` of the rewards failed, or all but one.
    """
    if batch.reward is None:
        return batch, {}
    log: dict[str, float] = {} if batch.cached is None else {"cached": batch.cached.mean().item()}
    if rewards.masked:
        batch, log["failed"] = _without_failed(batch, rewards)
    if batch.terms is None or not isinstance(rewards.reward, Mapping):
        return batch, log
    names = list(labels(list(rewards.reward)).values())
    log |= {f"reward_{name}": mean for name, mean in zip(names, batch.terms.mean(0).tolist())}
    balance = balance or Balance(rewards)
    if not balance.needed and rewards.normalize == "none":
        return batch, log
    total, share = balance.total(batch.terms, batch.group, step)
    if share is not None:
        log |= {f"share_{name}": part for name, part in zip(names, share.tolist())}
    plain = balance.plain(batch.terms) if rewards.normalize == "calibrated" else batch.reward
    log["reward"] = plain.mean().item()
    if balance.constraints:
        log["reward_std"] = plain.std(correction=0).item()
    return replace(batch, reward=total), log


def _without_failed(batch: Trajectory, rewards: RewardSpec) -> tuple[Trajectory, float]:
    """The walks whose reward is a number, and the share of the others."""
    fine, failed = valid(batch.reward, rewards.name, rewards.max_failed)
    return (replace(batch.take(fine), failed=int((~fine).sum())) if failed else batch), failed
