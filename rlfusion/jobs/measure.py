"""Measuring a model on fixed seeds: its reward, its quality, and the grid of pictures to look at."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlfusion import evaluation, models
from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import Key
from rlfusion.config import Evaluation, Figures
from rlfusion.data import Dataset
from rlfusion.data.sources import absolute
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import chain_noise, sample, walk
from rlfusion.evaluation import classifier
from rlfusion.evaluation.metrics import measured
from rlfusion.evaluation.report import SMALLEST
from rlfusion.jobs import train_clip
from rlfusion.rewards import (
    CallOptions,
    Reward,
    WeightedSum,
    build,
    labels,
    names_of,
    require_named,
    score,
    task_info,
    valid,
)
from rlfusion.rewards.calibration import stacked
from rlfusion.rewards.untrained import FROM_DATA, require_weights
from rlfusion.training.asking import asked
from rlfusion.training.tracking import grid

NO_CALL_OPTIONS = CallOptions()
GRID_ROWS, GRID_COLUMNS = 8, 20
WALKED, WALKED_NUMBERS = 64, 2**18
"""Samples, and numbers of latents, up to which samples are walked at a time where fewer are decoded."""

HEADLINES = ("reward", "agreement", "frechet", "frechet_floor", "precision", "recall", "diversity_relative")
PLAIN = ("reward", "diversity", "brightness", "edge_density", "entropy")
PIPELINE_ROWS, PIPELINE_COLUMNS = 2, 8


@dataclass(frozen=True)
class Judged:
    """The data that samples are compared with, and the judge that compares them."""

    train: Dataset
    held_out: Dataset
    judge: classifier.Classifier

    @classmethod
    def of(cls, data: Dataset, held_out: float, root: Path, device: torch.device) -> "Judged":
        """Split ``data`` and train the judge on the training part, or find it in the cache below ``root``."""
        train, rest = data.split(held_out)
        judge = classifier.load(classifier.cached(train, classifier.JUDGE, root))
        return cls(train, rest, judge.to(device))

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a sample."""
        return self.train.shape

    @property
    def names(self) -> tuple[str, ...]:
        """Of the conditions."""
        return self.train.names

    @property
    def classes(self) -> int:
        """How many conditions there are."""
        return self.train.classes

    def report(self, samples: Tensor, label: Tensor) -> dict[str, float]:
        """All of ``evaluation.Report``, by name."""
        return evaluation.report(samples, label, self.judge, self.held_out, self.train).as_dict()

    def figures(self, samples: Tensor, label: Tensor) -> dict[str, float]:
        """Those of ``report`` that so many samples can carry."""
        return evaluation.figures(samples, label, self.judge, self.held_out, self.train)

    def reward(
        self,
        reward: str | dict[str, float],
        options: dict[str, dict[str, Any]],
        root: Path,
        call_options: CallOptions = NO_CALL_OPTIONS,
        made: Mapping[str, Reward] | None = None,
    ) -> Reward:
        """The reward that settings name, as ``make_reward``."""
        return make_reward(reward, options, self.train, root, call_options, made)


@dataclass(frozen=True)
class Unjudged:
    """What is known of samples where no data is: their shape, the prompts, and what else is known of each prompt. No
    judge can be trained.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...] = ()
    judge: None = None

    @property
    def classes(self) -> int:
        """How many prompts there are."""
        return len(self.names)

    def report(self, samples: Tensor, label: Tensor) -> dict[str, float]:
        """``evaluation.plain_report``."""
        return evaluation.plain_report(samples, label)

    def figures(self, samples: Tensor, label: Tensor) -> dict[str, float]:
        """Those of ``report`` that so many samples can carry."""
        return evaluation.plain_figures(samples, label)

    def reward(
        self,
        reward: str | dict[str, float],
        options: dict[str, dict[str, Any]],
        root: Path,
        call_options: CallOptions = NO_CALL_OPTIONS,
        made: Mapping[str, Reward] | None = None,
    ) -> Reward:
        """The reward that settings name.

        Raises:
            ConfigError: as ``build``, or one of ``TRAINED`` that would need data to learn from.
        """
        require_weights(options)
        for name in names_of(reward):
            key, _ = TRAINED.get(name, ("", None))
            if key and name not in (made or {}) and not (options.get(name) or {}).get(key):
                raise ConfigError(
                    f"reward {name!r} has no data to learn from here: expected its option {key}, or another reward"
                )
        return build(reward, options, task_info(self.names, self.shape, self.metadata), call_options, made)


def require_models_data(name: str, data: Dataset, card: models.Card, held_out: float = 0.0) -> None:
    """
    Raises:
        ConfigError: the data of this name are not of the model's shape and classes, or no longer those of its training;
            or ``held_out`` is a larger share of them than it left out.
    """
    if (data.shape, data.names) != (card.shape, card.names):
        raise ConfigError(
            f"data = {name!r}: its samples are {data.shape} of {data.classes} classes, "
            f"the model's {card.shape} of {card.classes}"
        )
    now = {"data": absolute(name), "sha256": data.sha256, "held_out": held_out if data.held is None else 0.0}
    require_unchanged("the model", card.data, now)


def require_unchanged(what: str, held: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse data under the name of those that a model was pretrained on (``Card.data``) and with other content, or of
    which more is held out: what it has learned from would be held out, and the other way round. A smaller share of the
    same data is a part of the larger one.

    Raises:
        ConfigError: says so of ``what``.
    """
    if not held or held["data"] != now["data"]:
        return
    if now["held_out"] > held["held_out"]:
        raise ConfigError(
            f"held_out = {now['held_out']:g}: {what} was pretrained on all but {held['held_out']:g} of the same data, "
            "expected at most that share, or samples that it has learned from count as held out"
        )
    if held["sha256"] != now["sha256"]:
        raise ConfigError(
            f"{what} was pretrained on {shorten(held['data'], LONGEST_PATH)}, which has changed since (SHA-256 "
            f"{now['sha256'][:12]}, was {held['sha256'][:12]}): expected it as it was, or other data by another name"
        )


def require_judgeable(data: Dataset, held_out: float) -> None:
    """Refuse data on which no judge can be trained or no report made.

    Raises:
        ConfigError: fewer than two classes, images below 8x8, or a part of the split that is too small.
    """
    classifier.Classifier(classifier.JUDGE.kind, data.shape, data.classes)
    train, rest = data.split(held_out)
    if min(len(train), len(rest)) < SMALLEST or int(rest.label.bincount().max()) < 2:
        raise ConfigError(
            f"held_out = {held_out} splits the data into {len(train)} for training and {len(rest)} to compare with: "
            f"expected {SMALLEST} of each at least, and two of one class"
        )
    data.require_trained(held_out)


def make_reward(
    reward: str | dict[str, float],
    options: dict[str, dict[str, Any]],
    train: Dataset,
    root: Path,
    call_options: CallOptions = NO_CALL_OPTIONS,
    made: Mapping[str, Reward] | None = None,
) -> Reward:
    """The reward that settings name. One of ``TRAINED`` without weights gets those of ``train``, from the cache.
    ``made`` are those that exist already, by name.

    Raises:
        ConfigError: an unknown reward or option.
    """
    require_weights(options)
    require_named(options, names_of(reward))
    known, held = task_info(train.names, train.shape), dict(made or {})
    own = {name: {name: options.get(name) or {}} for name in names_of(reward) if name not in held}
    trained = [name for name in own if name in TRAINED and not own[name][name].get(TRAINED[name][0])]
    for name in own:  # what cannot be is refused before any training; one to be trained is made as a worker has it
        if name in trained:
            build(name, {name: {k: v for k, v in own[name][name].items() if k != TRAINED[name][0]}}, known)
        else:
            held[name] = build(name, own[name], known)
    full = {name: _with_weights(own[name][name], TRAINED[name][1](train, root)) for name in trained}
    return build(reward, options | full, known, call_options, held)


def _with_weights(given: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """A reward's options, and of those that name its weights the ones that are left open."""
    return {**given, **{option: value for option, value in weights.items() if not given.get(option)}}


def _trained_classifier(train: Dataset, root: Path) -> dict[str, Any]:
    return {"weights": str(classifier.cached(train, classifier.REWARD, root))}


def _trained_clip(train: Dataset, root: Path) -> dict[str, Any]:
    return {"model": str(train_clip.cached(train, root, Progress()))}


def _trained_texts(train: Dataset, root: Path) -> dict[str, Any]:
    return {**_trained_clip(train, root), "template": train_clip.templates_of((), train)[0]}


_MAKERS = {
    "class_logprob": _trained_classifier,
    "clip_score": _trained_texts,
    "clip_class": _trained_texts,
    "clip_similarity": _trained_clip,
}
TRAINED = {name: (key, _MAKERS[name]) for name, (key, _) in FROM_DATA.items()}
"""Rewards that are trained here where the option does not name their weights, and what gives them their options."""


def reward_parts(reward: Reward) -> dict[str, Tensor]:
    """The tensors that a reward holds, by name: what a worker needs beside the settings to build it again."""
    return dict(reward.state_dict()) if isinstance(reward, nn.Module) else {}


def at_once(chunk: int, latent: tuple[int, ...]) -> int:
    """How many samples are walked at a time, without gradients, where ``chunk`` are decoded: a fixed rule of the size
    of latents, so that samples do not depend on the machine or its load. It is never below ``chunk``.
    """
    return max(chunk, min(WALKED, WALKED_NUMBERS // math.prod(latent)))


def draw(policy: Policy, times: Tensor, label: Tensor, shape: tuple[int, ...], *key: Key) -> Tensor:
    """Samples (N, *shape) in [0, 1] of the labels (N,), on fixed seeds: sample i depends on ``key`` and i alone."""
    parts = _noise(policy, times, label, shape, key)
    return torch.cat([_decoded(policy, sample(policy, noise, times, some)) for noise, some in parts])


@torch.no_grad()
def draw_beside(
    policy: Policy, base: Policy, times: Tensor, label: Tensor, shape: tuple[int, ...], *key: Key
) -> tuple[Tensor, Tensor]:
    """The samples of ``draw``; and sum_t KL(policy || base) (N,), in nats, at the states of their walks: steps without
    noise have none.
    """
    noisy, samples, parts = (policy.stds(times) > 0).tolist(), [], []
    for noise, some in _noise(policy, times, label, shape, key):
        x, found = noise[:, 0], []
        for step, has_density in zip(walk(policy, noise, times, some), noisy):
            x = step.x
            if has_density:
                found.append(step.transition.kl(base(step.obs)))
        samples.append(_decoded(policy, x))
        parts.append(torch.stack(found).sum(0))
    return torch.cat(samples), torch.cat(parts)


def _decoded(policy: Policy, x: Tensor) -> Tensor:
    """The samples of latents, as many at a time as the model's space says."""
    return torch.cat([policy.space.decode(part) for part in x.split(policy.space.chunk)])


def _noise(
    policy: Policy, times: Tensor, label: Tensor, shape: tuple[int, ...], key: tuple[Key, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The noise of walks and their labels, ``at_once`` at a time."""
    latent = policy.space.latent(shape)
    for rows in torch.arange(len(label)).split(at_once(policy.space.chunk, latent)):
        noise = chain_noise(key, rows.tolist(), len(times) - 1, latent)
        yield noise.to(label.device), label[rows.to(label.device)]


class Scored(NamedTuple):
    """A reward to measure by its name in messages; up to the share ``max_failed`` of its values may fail, for None
    none.
    """

    reward: Reward
    name: str
    max_failed: float | None = None


@torch.no_grad()
def measure(
    policy: Policy,
    times: Tensor,
    judged: Judged | Unjudged,
    scored: Scored | None,
    settings: Figures,
    seed: int,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """reward and reward_std (where there is a reward; of several also reward_NAME), the report of ``judged`` and, if
    asked, bits_per_dim, by name.

    An ``Evaluation`` has all figures, ``Figures`` those that so many samples can carry.

    With ``scored.max_failed`` up to that share of the rewards may fail: reward_failed says how many, the others are
    averaged. ``keep`` is given the prompts and the rewards (N,), NaN where one failed.

    Raises:
        ConfigError: bits per dimension are asked for and not defined.
        NumericalError: a sample or a reward is not finite, or too many failed.
    """
    bits = evaluation.bits_per_dim(policy, times, judged.held_out, seed) if settings.bits_per_dim else {}
    device = next(policy.parameters()).device
    label = torch.arange(settings.samples, device=device) % judged.classes
    samples = draw(policy, times, label, judged.shape, seed, "evaluation")
    told = judged.report if isinstance(settings, Evaluation) else judged.figures
    result = told(samples, label) | bits | measured(settings.metrics, samples, label)
    if scored is None:
        return result
    value, terms = _rewards(scored, samples, label)
    if keep is not None:
        keep(label, value)
    if scored.max_failed is not None:
        fine, result["reward_failed"] = valid(value, scored.name, scored.max_failed)
        value, terms = value[fine], {name: term[fine] for name, term in terms.items()}
    result |= {f"reward_{name}": term.mean().item() for name, term in terms.items()}
    return {"reward": value.mean().item(), "reward_std": value.std(correction=0).item(), **result}


def _rewards(scored: Scored, samples: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The rewards (N,) of samples, NaN where one fails that may; and of several each one's, by its short name."""
    reward, name, masked = scored.reward, scored.name, scored.max_failed is not None
    if not isinstance(reward, WeightedSum):
        return asked(lambda: score(reward, samples, label, name, masked=masked)), {}
    held = asked(lambda: stacked(reward.terms(samples, label, masked)))
    terms = dict(zip(reward.rewards, held.unbind(1)))
    short = labels(list(terms))
    return reward.combine(terms), {short[one]: term for one, term in terms.items()}


def headlines(result: dict[str, float]) -> list[str]:
    """The names of what to show of an evaluation."""
    return [name for name in (HEADLINES if "frechet" in result else PLAIN) if name in result]


def look_of(card: models.Card) -> tuple[int, int, int]:
    """Columns and rows of a model's grid, and pixels of the picture for one of a sample."""
    if card.pipeline:
        return min(card.classes, PIPELINE_COLUMNS), PIPELINE_ROWS, 1
    return min(card.classes, GRID_COLUMNS), GRID_ROWS, 4


def seen(samples: Tensor, card: models.Card) -> Tensor:
    """The picture of the first of some samples (N, C, H, W), of the conditions 0, 1, ... in turn: laid out as a model's
    grid.
    """
    columns, rows, scale = look_of(card)
    index = [row * card.classes + column for row in range(rows) for column in range(columns)]
    return grid(samples[[i for i in index if i < len(samples)]], columns, scale)


def grid_samples(
    policy: Policy, times: Tensor, classes: int, shape: tuple[int, ...], seed: int, rows: int = GRID_ROWS
) -> Tensor:
    """Samples on the fixed seeds of the grid, ``rows`` a class, class by class along the columns."""
    device = next(policy.parameters()).device
    label = torch.arange(rows * classes, device=device) % classes
    return draw(policy, times, label, shape, seed, "grid").cpu()
