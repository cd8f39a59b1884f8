"""``rlfusion check-reward``: is this reward one that can be trained on? A row for each question, and the exit code.

Samples are real ones, half of them under noise, ``EACH`` a prompt; or what a model draws for its prompts. With R the
reward, x the samples, w, d drawn once:

    answers     one finite number a sample
    range       what it gives, from where to where
    input       the samples are as before
    repeats     R(x) again, bit for bit
    batch       R of each sample alone (of each prompt alone, where it compares) and of x in another order: the same
    condition   R(x) for the next prompt: does it change?
    gradient    d/dh of w R(x + h d) at h = 0, by autograd and by (w R(x + h d) - w R(x - h d)) / 2h: the same, not 0;
                that a reward gives none is told
    speed       samples a second, by batch
"""

import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.seeding import stream
from rlfusion.common.user_code import described
from rlfusion.config import CheckReward
from rlfusion.data import Dataset, load, to_pixels
from rlfusion.jobs.measure import Unjudged, draw, make_reward, require_models_data
from rlfusion.rewards import CallOptions, Reward, needs_groups, score
from rlfusion.training.devices import pick_device, set_numerics

EACH = 4
MARGIN = 0.05
TOLERANCE = 1e-4
BATCHES = (4, 16, 64)
SPEED_S = 0.3
STEPS = {torch.float64: (1e-6, 1e-4), torch.float32: (1e-2, 5e-2)}
"""The h of a finite difference and its relative tolerance, by the precision in which the reward works."""


Verdict = Literal["ok", "note", "FAILS"]


class Finding(NamedTuple):
    """One row: which check, how it went, and what was seen."""

    check: str
    verdict: Verdict
    message: str


class Trial(NamedTuple):
    """A reward and what it is tried on: samples (B, C, H, W) in [0, 1] and their labels (B,) of ``classes``."""

    name: str
    reward: Reward
    samples: Tensor
    label: Tensor
    classes: int
    seed: int

    def __call__(self, samples: Tensor, label: Tensor) -> Tensor:
        """The checked reward (B,)."""
        return score(self.reward, samples, label, self.name)


def check_reward(settings: CheckReward) -> Iterator[Finding]:
    """The findings, one by one; if the reward does not answer, no others.

    Raises:
        ConfigError: no such reward or data.
    """
    device = pick_device(settings.device)
    set_numerics(settings.threads, device)
    options = {settings.reward: settings.options} if settings.options else {}
    call_options, root = CallOptions(timeout_s=settings.timeout_s), Path(settings.root)
    card = _card(settings) if settings.model else None
    if card is not None and card.pipeline:
        known = Unjudged(card.shape, card.names, card.metadata)
        reward, classes = known.reward(settings.reward, options, root, call_options), card.classes
    else:
        data = load(settings.data, settings.size, Progress().say)
        if card is not None:
            require_models_data(settings.data, data, card, settings.held_out)
        else:
            samples, label = _samples(data, settings.samples, settings.seed)
        reward = make_reward(settings.reward, options, data.split(settings.held_out)[0], root, call_options)
        classes = data.classes
    if card is not None:
        samples, label = _drawn(settings, card, device)
    if isinstance(reward, nn.Module):
        reward.to(device)
    return examine(Trial(settings.reward, reward, samples.to(device), label.to(device), classes, settings.seed))


def _card(settings: CheckReward) -> models.Card:
    """Of the model: with those of its prompts alone that are drawn for."""
    card = models.describe(settings.model, settings.pipeline, settings.chain.negative)
    return card.first(max(2, _prompts(settings)))


def _prompts(settings: CheckReward) -> int:
    return max(1, settings.samples // EACH)


def _drawn(settings: CheckReward, card: models.Card, device: torch.device) -> tuple[Tensor, Tensor]:
    """What a model draws: ``EACH`` samples of each of its first prompts."""
    denoiser = models.build(card, device=device) if card.pipeline else models.load(Path(settings.model))[0]
    denoiser = denoiser.to(device)
    policy, times = settings.chain.policy(denoiser, card.names), settings.chain.times(denoiser)
    label = torch.arange(min(_prompts(settings), card.classes), device=device).repeat_interleave(EACH)
    return draw(policy, times, label, card.shape, settings.seed, "check"), label


def _samples(data: Dataset, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Whole prompts of ``EACH`` samples, every second one noisy."""
    prompts = [c for c in range(data.classes) if int((data.label == c).sum()) >= EACH][: max(1, count // EACH)]
    if not prompts:
        raise ConfigError(f"data: no class has {EACH} samples, expected one that has")
    rows = torch.cat([(data.label == c).nonzero().flatten()[:EACH] for c in prompts])
    x = to_pixels(data.x[rows])
    noise = torch.from_numpy(stream(seed, "check", "noise").random(tuple(x.shape), dtype="float32"))
    noisy = (torch.arange(len(x)) % 2).reshape(-1, 1, 1, 1) * 0.5
    return (1 - noisy) * x + noisy * noise, data.label[rows]


def examine(trial: Trial) -> Iterator[Finding]:
    """All checks of one reward."""
    begin = time.perf_counter()
    try:
        value = trial(trial.samples.clone(), trial.label).detach()
    except Exception as error:  # whatever a user's reward raises is the finding
        yield Finding("answers", "FAILS", described(error))
        return
    yield Finding("answers", "ok", f"({len(value)},) finite numbers in {time.perf_counter() - begin:.3f} s")
    checks = (_range, _input, _repeats, _batch, _condition, _gradient, _speed)
    for check in checks:
        try:
            yield check(trial, value)
        except Exception as error:
            yield Finding(check.__name__.strip("_"), "FAILS", described(error))


def _range(trial: Trial, value: Tensor) -> Finding:
    message = f"{value.min():.4g} to {value.max():.4g}, mean {value.mean():.4g}, std {value.std(correction=0):.3g}"
    flat = bool((value == value[0]).all())
    return Finding("range", "note" if flat else "ok", message + (": flat, nothing to learn from here" if flat else ""))


def _input(trial: Trial, value: Tensor) -> Finding:
    samples, label = trial.samples.clone(), trial.label.clone()
    trial(samples, label)
    same = torch.equal(samples, trial.samples) and torch.equal(label, trial.label)
    return Finding("input", "ok" if same else "FAILS", "left as it was" if same else "the reward changes its samples")


def _repeats(trial: Trial, value: Tensor) -> Finding:
    again = trial(trial.samples, trial.label).detach()
    if torch.equal(again, value):
        return Finding("repeats", "ok", "bit for bit")
    return Finding("repeats", "FAILS", f"differs by up to {(again - value).abs().max():.3g}: a run cannot be resumed")


def _batch(trial: Trial, value: Tensor) -> Finding:
    each = EACH if needs_groups(trial.reward) else 1
    parts = [trial(x, c).detach() for x, c in zip(trial.samples.split(each), trial.label.split(each))]
    order = torch.from_numpy(stream(trial.seed, "check", "order").permutation(len(value))).to(value.device)
    shuffled = torch.empty_like(value)
    shuffled[order] = trial(trial.samples[order], trial.label[order]).detach()
    error = max((torch.cat(parts) - value).abs().max().item(), (shuffled - value).abs().max().item())
    limit = TOLERANCE * max(value.std(correction=0).item(), value.abs().max().item())
    what = "whole prompts" if each > 1 else "samples"
    message = "bit for bit" if error == 0 else f"to {error:.2g}"
    if error <= limit:
        return Finding("batch", "ok", f"{what} alone and in another order: the same {message}")
    return Finding("batch", "FAILS", f"{what} alone or in another order differ by {error:.3g}")


def _condition(trial: Trial, value: Tensor) -> Finding:
    other = trial(trial.samples, (trial.label + 1) % trial.classes).detach()
    changed = int((other != value).sum())
    message = f"another prompt changes {changed} of {len(value)}" if changed else "does not depend on it"
    return Finding("condition", "note" if trial.classes > 1 else "ok", message)


def _gradient(trial: Trial, value: Tensor) -> Finding:
    if not trial(trial.samples.clone().requires_grad_(), trial.label).requires_grad:
        return Finding("gradient", "note", "none: not for agents that learn through it (draft, refl)")
    f, dtype = _weighted(trial)
    x = (MARGIN + (1 - 2 * MARGIN) * trial.samples).to(dtype)
    drawn = stream(trial.seed, "check", "direction").standard_normal(tuple(x.shape))
    direction = torch.from_numpy(drawn).to(x)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(leaf), leaf)
    h, tolerance = STEPS[dtype]
    by_autograd = (slope * direction).sum().item()
    with torch.no_grad():
        by_difference = ((f(x + h * direction) - f(x - h * direction)) / (2 * h)).item()
    message = f"{by_autograd:.6g} by autograd, {by_difference:.6g} by finite differences ({str(dtype)[6:]})"
    close = abs(by_autograd - by_difference) <= tolerance * max(abs(by_autograd), abs(by_difference))
    if not bool(slope.isfinite().all()):
        return Finding("gradient", "FAILS", "not finite")
    if not bool(slope.any()):
        return Finding("gradient", "FAILS", f"0 everywhere; {by_difference:.3g} by finite differences")
    return Finding("gradient", "ok" if close else "FAILS", message)


def _weighted(trial: Trial) -> tuple[Callable[[Tensor], Tensor], torch.dtype]:
    """w R(x) as a function of x, and the highest precision in which the reward works."""
    w = torch.from_numpy(stream(trial.seed, "check", "weight").random(len(trial.samples)) + 0.5)
    reward = trial.reward
    doubled = copy.deepcopy(reward).double() if isinstance(reward, nn.Module) and _has_weights(reward) else reward
    exact = trial._replace(reward=doubled)
    try:
        exact(trial.samples.double(), trial.label)
    except Exception:  # a reward need not work in float64
        return (lambda x: (w.to(x) * trial(x, trial.label)).sum()), torch.float32
    return (lambda x: (w.to(x) * exact(x, trial.label)).sum()), torch.float64


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


@torch.no_grad()
def _speed(trial: Trial, value: Tensor) -> Finding:
    message = []
    for batch in BATCHES:
        rows = torch.arange(batch, device=value.device) % len(value)
        x, label = trial.samples[rows], trial.label[rows]
        count, begin = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - begin < SPEED_S:
            trial(x, label)
            count += batch
        message.append(f"{batch}: {count / (time.perf_counter() - begin):.3g}/s")
    return Finding("speed", "ok", "batch of " + ", ".join(message))
