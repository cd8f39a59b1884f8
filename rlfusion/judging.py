"""The public functions that give a model a reward or a judge: evaluate, and the chain as an environment.

``import rlfusion as rlf`` has them; what is not named there may change.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from rlfusion.api import ModelLike, model_of
from rlfusion.common import spec
from rlfusion.config import Figures
from rlfusion.data import load as load_data
from rlfusion.envs import DenoisingEnv, DenoisingVectorEnv
from rlfusion.evaluation import require_independent
from rlfusion.jobs.measure import Judged, Scored, Unjudged, measure, require_models_data
from rlfusion.rewards import CallOptions, Reward, task_info
from rlfusion.rewards.given import named
from rlfusion.rewards.registry import built

DIGITS, DIGITS_SHAPE = range(10), (1, 8, 8)
RewardLike = str | Callable[..., Any] | Mapping[str | Callable[..., Any], float]

PLAIN = CallOptions()
HELD_OUT = 0.25
"""The share of the data that a model is measured against, as of ``rlfusion evaluate``."""


def evaluate(
    model: ModelLike,
    reward: RewardLike | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    data: str = "",
    size: int = 32,
    root: str | os.PathLike[str] = "runs",
    reward_options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, float]:
    """Measure a model on fixed seeds: what ``rlfusion evaluate`` measures, by name.

    Args:
        model: a model, or the path of one.
        reward: a name, a callable ``(samples, cond) -> (B,)``, or {reward: weight}. None measures none.
        samples: how many, from 1 on; the classes take turns. A figure that so many cannot carry is left out.
        seed: keys the noise.
        data: the real data to compare with, such as "digits"; then the result has agreement, frechet, precision,
            recall, ... of a judge, which is trained on them once and kept in ``root``/cache. "" compares with none.
        size: images of a folder are brought to size x size.
        root: whose cache holds what is trained on the data.
        reward_options: settings of each named reward.

    Raises:
        ConfigError: an unknown reward, or data that are not the model's.
        NumericalError: a sample or a reward is not finite.
        UserCodeError: the reward raised.
    """
    held = model_of(model)
    judged: Judged | Unjudged = Unjudged(held.shape, held.names, held.card.metadata)
    if data:
        found = load_data(data, size)
        require_models_data(data, found, held.card)
        judged = Judged.of(found, HELD_OUT, Path(root), held.device)
    names, objects = named(reward) if reward is not None else ("", {})
    scorer = None
    if reward is not None:
        scorer = made_reward(judged, names, objects, reward_options or {}, Path(root), held.device)
        if judged.judge is not None:
            require_independent(judged.judge, scorer)
    settings = Figures(samples=samples)
    scored = None if scorer is None else Scored(scorer, str(names), None)
    return measure(held.policy, held.times, judged, scored, settings, seed)


def made_reward(
    judged: Judged | Unjudged,
    names: str | dict[str, float],
    objects: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]],
    root: Path,
    device: torch.device,
    calls: CallOptions = PLAIN,
) -> Reward:
    """The reward of names, some of which stand for Python objects, on a device."""
    known = task_info(judged.names, judged.shape, getattr(judged, "metadata", ()))
    made = {name: built(name, one, options.get(name, {}), known) for name, one in objects.items()}
    reward = judged.reward(names, {name: dict(held) for name, held in options.items()}, root, calls, made)
    return reward.to(device) if isinstance(reward, nn.Module) else reward


@overload
def make_env(
    model: ModelLike | None = None, reward: RewardLike = "ink", num_envs: None = None, **settings: Any
) -> DenoisingEnv: ...
@overload
def make_env(model: ModelLike | None, reward: RewardLike, num_envs: int, **settings: Any) -> DenoisingVectorEnv: ...
def make_env(
    model: ModelLike | None = None, reward: RewardLike = "ink", num_envs: int | None = None, **settings: Any
) -> DenoisingEnv | DenoisingVectorEnv:
    """The denoising chain as a Gymnasium environment: the chain of a model, or ten steps on 8x8 digits without one.

    Args:
        model: a model, or the path of one: its schedule, time grid, shape, classes and decoder.
        reward: a name, a callable ``(samples, cond) -> (B,)``, or {reward: weight}: given at the end of the chain.
        num_envs: None for one environment with numpy arrays; B for one batch of tensors (``gymnasium.vector``).
        settings: further ones of ``rlfusion.envs.DenoisingVectorEnv``: action="noise" (the action is then the noise
            that the model's own sampler injects), backend="torch", device=..., render_mode=...

    Raises:
        ConfigError: a setting that cannot work.
    """
    chain = dict(settings)
    names, objects = named(reward)
    if model is None:
        known = Unjudged(DIGITS_SHAPE, tuple(map(str, DIGITS)))
    else:
        held = model_of(model)
        known = Unjudged(held.shape, held.names, held.card.metadata)
        own = {"schedule": held.denoiser.schedule, "grid": held.chain.grid(held.denoiser), "device": held.device}
        own |= {"shape": held.policy.space.latent(held.shape), "conditions": range(len(held.names))}
        own |= {"decode": held.policy.space.decode}
        own |= {"policy": held.policy} if chain.get("action") == "noise" else {}
        chain = own | chain
    device = torch.device(chain.get("device", "cpu"))
    chain["reward"] = made_reward(known, names, objects, {}, Path("runs"), device)
    made, what = (DenoisingEnv, {}) if num_envs is None else (DenoisingVectorEnv, {"num_envs": num_envs})
    return spec.call(made, chain | what, "make_env")
