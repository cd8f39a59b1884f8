"""What of a checkpoint holds under the settings alone that it was saved under, and begins anew where one is changed.

    goes on under any change    the weights, their average, the optimiser's moments, how many updates and queries
    begins anew, by ``ROWS``    what was made of the rewards and the walks of earlier rollouts

An agent says which entries of its learner's state are of which kind: ``KEPT`` of its settings, {entry: kind}.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from rlfusion.common.errors import unknown
from rlfusion.rl.agent import Agent

ADVANTAGES, WALKS, CRITIC, UNIT, PACE = LEARNED = ("advantages", "walks", "critic", "unit", "pace")
"""Those that an agent's learner may have."""
REWARDS, NORMS, BEST, MULTIPLIERS = "rewards", "norms", "best", "multipliers"
SAID = {
    ADVANTAGES: "the recent rewards of each prompt",
    WALKS: "the walks that are kept",
    CRITIC: "the critic",
    UNIT: "the unit of rewards",
    PACE: "the share of the learning rate",
    REWARDS: "the guard's best reward",
    NORMS: "the guard's gradient norms",
    BEST: "the best model so far",
    MULTIPLIERS: "the multipliers of the constraints",
}
"""The kinds of state, in words."""

OF_GUARD = {REWARDS: ("best", "first_std", "bad_in_a_row"), NORMS: ("norms",)}
"""What the guard has of each kind; the bad updates of the whole run go on being counted."""
GOOD = "good"
"""The states that the guard could go back to: they hold what an agent keeps, too."""

SAME_LOSS = "lr|warmup|pace|optimizer|weight_decay|max_grad_norm|ema_decay|micro_batch|epochs|updates_per_epoch|memory"
SAME_LOSS += "|fused|target_kl|advantage_window|critic_.*|value_(lr|epochs|batch)"
"""Settings of agents that change no loss, but how it is followed."""

ALL = tuple(SAID)
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"reward(\..*)?|reward_options\..*|reward_normalize|constraint|base_samples", ALL),
    (r"chain\..*", ALL),
    (r"base|pretrain\.(data|size|held_out)|pipeline\.(prompts|prompt_column|encoding|prompts_sha256|size)", ALL),
    (r"pipeline\.(adapters|adapters_sha256|scheduler)", ALL),
    (r"rollout\.(prompts|samples_per_prompt)", (ADVANTAGES,)),
    (r"agent\.kl_reward", (ADVANTAGES,)),
    (r"agent\.advantage", (ADVANTAGES, CRITIC)),
    (r"agent\.(q|critic|value|value_net|form|alpha|scale|gamma|lam)", (CRITIC,)),
    (r"agent\.on", (WALKS,)),
    (r"agent\.pace", (PACE,)),
    (rf"agent\.(?!({SAME_LOSS})$).*", (NORMS,)),
    (r"seed|monitor\.(best|samples|held_out)", (BEST,)),
)
"""Settings, as a pattern of their whole dotted name, and the kinds of state that do not outlive a change of them."""


def kept(agent: Agent) -> dict[str, str]:
    """The kind of each entry of the learner's state that has one.

    Raises:
        ConfigError: a kind that is none.
    """
    held = agent.KEPT
    for entry, kind in held.items():
        if kind not in LEARNED:
            raise unknown(f"kind of state of {entry!r}, which agent {agent.name!r} keeps,", kind, LEARNED)
    return dict(held)


def stale(changed: Iterable[str], settings: Mapping[str, Any], rewards: Iterable[str]) -> tuple[str, ...]:
    """The kinds of state that do not outlive a change of these settings, in the order of ``SAID``.

    ``settings`` are all, by dotted name; ``rewards`` are those that are learned from. A file of the user's own stands
    for the settings that name it, and the options of a reward that is only watched for ``monitor.held_out``.
    """
    names = {_meant(one, set(rewards)) for name in changed for one in _named(name, settings)}
    found = {kind for pattern, kinds in ROWS for name in names if re.fullmatch(pattern, name) for kind in kinds}
    return tuple(kind for kind in SAID if kind in found)


def _named(name: str, settings: Mapping[str, Any]) -> list[str]:
    """The settings that name a file of the user's own, whose content has changed; of another, its own name."""
    path = name.removeprefix("files.")
    if path == name:
        return [name]
    return [one for one, value in settings.items() if one != name and path in f"{one} {value}"]


def _meant(name: str, rewards: set[str]) -> str:
    options = name.removeprefix("reward_options.")
    if options == name or any(options == one or options.startswith(f"{one}.") for one in rewards):
        return name
    return "monitor.held_out"


def begin_anew(
    state: dict[str, Any], fresh: Mapping[str, Any], kept: Mapping[str, str], kinds: Collection[str]
) -> list[str]:
    """Put what is of these kinds in ``state``, that of a run's checkpoint, back to the beginning, which ``fresh`` has.

    Args:
        kept: the kind of each entry of the learner's state that has one, as the agent says.

    Returns:
        the kinds that there were.
    """
    learner, made = state["learner"]["learner"], fresh["learner"]["learner"]
    entries = {entry: kind for entry, kind in kept.items() if kind in kinds and (entry in learner or entry in made)}
    for entry in entries:
        learner.pop(entry, None)
    learner |= {entry: made[entry] for entry in entries if entry in made}
    for name in [name for kind in kinds for name in OF_GUARD.get(kind, ())] + [GOOD] * bool(entries):
        state["learner"]["guard"][name] = fresh["learner"]["guard"][name]
    if BEST in kinds:
        state["watch"]["best"] = fresh["watch"]["best"]
    balance, absent = state.get("balance", {}), {*LEARNED}
    if not balance.get("multipliers"):
        absent.add(MULTIPLIERS)
    elif MULTIPLIERS in kinds:
        balance["multipliers"] = {}
    return [kind for kind in SAID if kind in entries.values() or (kind in kinds and kind not in absent)]


def told(changed: Iterable[str], begun: Iterable[str]) -> str:
    """The line that says what begins anew, and why."""
    what = ", ".join(SAID[kind] for kind in begun)
    return f"{', '.join(changed)} changed: {what} begin anew; the weights, their average and the optimiser go on"
