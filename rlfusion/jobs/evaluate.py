"""The job of ``rlfusion evaluate``: a model in figures, or two on the same seeds, under one sampler or both."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlfusion import config, evaluation, models
from rlfusion.common.code_files import label
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.data import Dataset, load
from rlfusion.diffusion.chain import Chain
from rlfusion.evaluation import require_independent
from rlfusion.evaluation.metrics import measured
from rlfusion.evaluation.paired import flips, standard_error
from rlfusion.evaluation.report import CARRIED_BY
from rlfusion.jobs import suites
from rlfusion.jobs.against_real import Beside, beside_of
from rlfusion.jobs.measure import Judged, Unjudged, draw, make_reward, require_models_data
from rlfusion.jobs.sample import Sampler, sampler
from rlfusion.models import pipelines
from rlfusion.rewards import Reward, labels, names_of, score
from rlfusion.training import checkpoint
from rlfusion.training.asking import asked
from rlfusion.training.devices import pick_device, set_numerics

FLIPS = 10_000
"""Draws of signs of the paired test, where there are too many for all."""


@dataclass
class Figures:
    """What one sampler of one model is found to be.

    Attributes:
        values: figures by name.
        each: of every reward its value of each sample (N,), by its name.
        left_out: figures that so many samples cannot carry, and what would.
    """

    values: dict[str, float]
    each: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def of_prompts(self, prompts: Sequence[int], count: int) -> "Figures":
        """The rewards of the samples of these prompts, of ``count`` that come in turn."""
        wanted = set(prompts)
        some = {n: v[[i for i in range(len(v)) if i % count in wanted]] for n, v in self.each.items()}
        return Figures({}, some)


Found = dict[tuple[str, str], Figures]
"""By model, as it was named, and sampler."""


def evaluate(settings: config.Evaluate, show: Callable[[Found, dict[str, Any]], None]) -> None:
    """Measure; the figures are shown, and then written to ``out``, if asked."""
    set_numerics(settings.threads, pick_device(settings.device))
    suite = suites.read(settings.suite, Path(settings.root)) if settings.suite else None
    if suite is not None:
        many = replace(settings.evaluation, samples=suite.count * settings.per_prompt)
        settings = replace(settings, suite="", per_prompt=1, prompts=suite.prompts, evaluation=many)
    first = _sampler(settings, settings.checkpoint)
    judged, rewards = _judged(settings, first.card, suite.metadata if suite else first.card.metadata)
    if settings.evaluation.bits_per_dim and isinstance(judged, Unjudged):
        raise ConfigError("evaluation.bits_per_dim = True: there are no held-out data of this model, expected false")
    beside = beside_of(settings, first.card.shape, Progress().say)
    held: dict[str, Sampler] = {settings.checkpoint: first}
    if settings.against:
        held[_name_of_second(settings)] = _paired(settings, first)
    found: Found = {}
    for name, one in held.items():
        for which in settings.samplers:
            found[name, which] = _measured(settings, _chained(one, settings.chain, which), judged, rewards, beside)
    result = _result(found, settings.seed)
    if suite is not None:
        result["suite"] = _by_category(suite, found, settings.seed)
    show(found, result)
    if settings.out:
        checkpoint.write_json_atomic(Path(settings.out), result)


def _by_category(suite: suites.Suite, found: Found, seed: int) -> dict[str, Any]:
    """``suites.figures``; of two models with their differences, sample by sample."""
    models_, samplers = (list(dict.fromkeys(key[n] for key in found)) for n in (0, 1))
    pairs = [(s, *(found[m, s] for m in models_)) for s in samplers] if len(models_) == 2 else []
    return suites.figures(suite, found, pairs, lambda first, second: _differences(first, second, seed))


def _name_of_second(settings: config.Evaluate) -> str:
    return settings.against if settings.against != settings.checkpoint else f"{settings.against} (again)"


def _sampler(settings: config.Evaluate, name: str) -> Sampler:
    """The model of that name, with the prompts of the settings.

    Raises:
        ConfigError: prompts for a model that reads none.
    """
    if not settings.prompts:
        return sampler(replace(settings, checkpoint=name), settings.evaluation.samples)
    pipeline = pipelines.is_pipeline(name) or bool(models.load_card(Path(name)).pipeline)
    if pipeline:
        told = replace(settings.pipeline, prompts=settings.prompts)
        return sampler(replace(settings, checkpoint=name, prompts="", pipeline=told), settings.evaluation.samples)
    held = sampler(replace(settings, checkpoint=name), 0)
    if not held.card.captioned:
        raise ConfigError(
            f"prompts = {settings.prompts!r}: model {name!r} knows classes and reads no texts, expected none"
        )
    texts = tuple(pipelines.read_prompts(settings.prompts, "").texts)[: settings.evaluation.samples]
    held.denoiser.net.label.set(texts)
    card = replace(held.card, names=texts)
    return held._replace(card=card, policy=settings.chain.policy(held.denoiser, texts))


def _paired(settings: config.Evaluate, first: Sampler) -> Sampler:
    """The second model.

    Raises:
        ConfigError: its samples or prompts are others than the first's.
    """
    second = _sampler(settings, settings.against)
    if (second.card.shape, second.card.names) != (first.card.shape, first.card.names):
        raise ConfigError(
            f"against = {settings.against!r}: its samples are {second.card.shape} of {second.card.classes} classes or "
            f"prompts, the first model's {first.card.shape} of {first.card.classes}: expected the same of both"
        )
    return second


def _chained(held: Sampler, chain: Chain, which: str) -> Sampler:
    """The model under the sampler ``which``."""
    if which == "training":
        return held
    about = held.card.pipeline
    if about:
        keys = ("variant", "family", "scheduler")
        told = pipelines.Settings(**{key: about.get(key, "") for key in keys})
        own = pipelines.defaults(about["name"], False, told)
        chain = Chain(**own, negative=chain.negative)
    else:
        chain = replace(chain, kernel="DDIM(eta=0.0)", last_noise=0.0)
    return held._replace(policy=chain.policy(held.denoiser, held.card.names), times=chain.times(held.denoiser))


def _judged(
    settings: config.Evaluate, card: models.Card, metadata: tuple[Mapping[str, Any], ...]
) -> tuple[Judged | Unjudged, dict[str, Reward]]:
    """What the samples are held against, and the rewards by name; the one of ``reward`` as "reward". ``metadata`` are
    of the prompts.
    """
    root, device = Path(settings.root), pick_device(settings.device)
    unjudged = bool(card.pipeline or settings.prompts)
    judged: Judged | Unjudged = Unjudged(card.shape, card.names, metadata)
    data = None if unjudged else _data(settings, card)
    named: dict[str, str | dict[str, float]] = {"reward": settings.reward} if settings.reward else {}
    named |= dict(zip((f"reward_{name}" for name in labels(settings.rewards).values()), settings.rewards))
    rewards: dict[str, Reward] = {}
    for name, text in named.items():
        options = {one: held for one, held in settings.reward_options.items() if one in names_of(text)}
        if data is None:
            rewards[name] = judged.reward(text, options, root)
        else:
            rewards[name] = make_reward(text, options, data.split(settings.held_out)[0], root)
        if isinstance(rewards[name], torch.nn.Module):
            rewards[name].to(device)  # type: ignore[attr-defined]
    _require_known(settings)
    if data is not None:
        judged = Judged.of(data, settings.held_out, root, device)  # trained last: a reward that cannot be is said first
        for reward in rewards.values():
            require_independent(judged.judge, reward)
    return judged, rewards


def _require_known(settings: config.Evaluate) -> None:
    """
    Raises:
        ConfigError: options of a reward that is not measured.
    """
    known = [*(names_of(settings.reward) if settings.reward else ()), *settings.rewards]
    for name in settings.reward_options:
        if name not in known:
            raise ConfigError(f"reward_options of {name!r}: expected options of {', '.join(known) or 'a reward'}")


@torch.no_grad()
def _measured(
    settings: config.Evaluate,
    held: Sampler,
    judged: Judged | Unjudged,
    rewards: Mapping[str, Reward],
    beside: Beside,
) -> Figures:
    """One model under one sampler, on the fixed seeds."""
    many, seed = settings.evaluation.samples, settings.seed
    device = next(held.policy.parameters()).device
    label_ = torch.arange(many, device=device) % held.card.classes
    samples = draw(held.policy, held.times, label_, held.card.shape, seed, "evaluation")
    figures = Figures({})
    for name, reward in rewards.items():
        value = asked(lambda reward=reward, name=name: score(reward, samples, label_, _called(settings, name)))
        figures.each[name] = value
        figures.values |= {name: value.mean().item(), f"{name}_std": value.std(correction=0).item()}
    report = judged.figures(samples, label_)
    figures.left_out |= {name: why for name, why in _needs(judged).items() if name not in report}
    if settings.evaluation.bits_per_dim and isinstance(judged, Judged):
        report |= evaluation.bits_per_dim(held.policy, held.times, judged.held_out, seed)
    figures.values |= report | measured(settings.evaluation.metrics, samples, label_)
    values, left_out = beside.figures(samples, label_)
    figures.values |= values
    figures.left_out |= left_out
    return figures


def _needs(judged: Judged | Unjudged) -> dict[str, str]:
    return CARRIED_BY if isinstance(judged, Judged) else {"diversity": CARRIED_BY["diversity"]}


def _called(settings: config.Evaluate, name: str) -> str:
    return str(settings.reward) if name == "reward" else name.removeprefix("reward_")


def _result(found: Found, seed: int) -> dict[str, Any]:
    """What is written: the figures alone of one model under one sampler; else by model and sampler, and of two models
    the difference of each reward, sample by sample.
    """
    if len(found) == 1:
        return dict(next(iter(found.values())).values)
    names, samplers = (list(dict.fromkeys(key[n] for key in found)) for n in (0, 1))
    held: dict[str, Any] = {"models": {n: {s: found[n, s].values for s in samplers} for n in names}}
    if len(names) == 2:
        first, second = names
        held["paired"] = {s: _differences(found[first, s], found[second, s], seed) for s in samplers}
    return held


def _differences(first: Figures, second: Figures, seed: int) -> dict[str, dict[str, float]]:
    """Of each reward: the mean of first - second over the samples, its standard error and p, and how often it is above
    0, a tie being half.
    """
    said = {}
    for name, value in first.each.items():
        d = (value - second.each[name]).double()
        said[name] = {"difference": d.mean().item(), "better": ((d > 0).double() + (d == 0).double() / 2).mean().item()}
        if len(d) > 1:
            said[name] |= {"standard_error": standard_error(d), "p": flips(d, FLIPS, seed)}
    return said


def _data(settings: config.Evaluate, card: models.Card) -> Dataset:
    """The data of an evaluation.

    Raises:
        ConfigError: they are not the model's.
    """
    data = load(settings.data, settings.size, Progress().say)
    require_models_data(settings.data, data, card, settings.held_out)
    return data


def short_names(found: Found) -> dict[str, str]:
    """The models by a short name, for tables."""
    names = list(dict.fromkeys(name for name, _ in found))
    short = [label(Path(name).name) or name for name in names]
    return dict(zip(names, short if len(set(short)) == len(short) else names))
