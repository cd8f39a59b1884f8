"""The job of ``rlfusion evaluate``: a model in figures."""

from collections.abc import Callable
from pathlib import Path

import torch

from rlfusion import config, models
from rlfusion.common.progress import Progress
from rlfusion.data import Dataset, load
from rlfusion.evaluation import require_independent
from rlfusion.jobs.measure import Judged, Scored, Unjudged, make_reward, measure, require_models_data
from rlfusion.jobs.sample import sampler
from rlfusion.training import checkpoint
from rlfusion.training.devices import pick_device, set_numerics


def evaluate(settings: config.Evaluate, show: Callable[[dict[str, float]], None]) -> None:
    """Measure a model; its figures are shown, and then written to ``out``, if asked."""
    set_numerics(settings.threads, pick_device(settings.device))
    most = settings.evaluation.samples
    _, card, policy, times = sampler(settings, most)
    device, root = pick_device(settings.device), Path(settings.root)
    if card.pipeline:
        judged: Judged | Unjudged = Unjudged(card.shape, card.names, card.metadata)
        reward = judged.reward(settings.reward, settings.reward_options, root) if settings.reward else None
    else:
        data = _data(settings, card)
        train, _ = data.split(settings.held_out)
        reward = make_reward(settings.reward, settings.reward_options, train, root) if settings.reward else None
        judged = Judged.of(data, settings.held_out, root, device)  # trained last: a reward that cannot be is said first
    scored = None
    if reward is not None:
        if judged.judge is not None:
            require_independent(judged.judge, reward)
        if isinstance(reward, torch.nn.Module):
            reward.to(device)
        scored = Scored(reward, str(settings.reward))
    result = measure(policy, times, judged, scored, settings.evaluation, settings.seed)
    show(result)
    if settings.out:
        checkpoint.write_json_atomic(Path(settings.out), result)


def _data(settings: config.Evaluate, card: models.Card) -> Dataset:
    """The data of an evaluation.

    Raises:
        ConfigError: they are not the model's.
    """
    data = load(settings.data, settings.size, Progress().say)
    require_models_data(settings.data, data, card)
    return data
