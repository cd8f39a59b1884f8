"""``rlfusion check-model``: can this model be trained by reward? A row for each question, and the exit code.

answers     the network's y is finite and shaped like x_t at the first, a middle and the last time of the chain
condition   another prompt changes the answer
batch       a sample's answer is the same alone and beside others
kind        samples of the model's own, noised to a middle time: eps_hat against the noise that was added; the error
            is below 1, that of knowing nothing, and no other kind would read the same answers better
decode      samples are (B, C, H, W) in [0, 1], and come back from the encoder in the latents' shape
ratio       log p of the walks' own steps, computed again as a learner does: the same
noise       of each step of the chain: none so small that a policy gradient explodes there
gradient    of the decoded image's mean reaches every weight that is trained, and is finite
guidance    how this model is guided at these settings
sampler     a pipeline's own sampler ends at the same latents from the same noise; of a solver of several steps its
            first-order form does, and how far the solver itself ends from there is a note
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common.errors import ConfigError
from rlfusion.config import CheckModel
from rlfusion.diffusion.chain import Chain, narrow
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.parameterization import PLAIN, predict, solve, target
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.sampling import chain_noise, sample, walk
from rlfusion.diffusion.schedule import level
from rlfusion.jobs import sampler_check
from rlfusion.jobs.check_reward import Finding
from rlfusion.training.devices import pick_device, set_numerics

ALIKE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""How far two computations of one thing may be apart, as a share of the largest number, by precision."""


class Trial(NamedTuple):
    """A model and what it is tried on: the noise of B walks and their conditions (B,)."""

    settings: CheckModel
    card: models.Card
    denoiser: Denoiser
    chain: Chain
    policy: Policy
    times: Tensor
    noise: Tensor
    label: Tensor

    @property
    def alike(self) -> float:
        """How far two computations may be apart."""
        return ALIKE[self.card.pipeline["dtype"] if self.card.pipeline else "float32"]

    def ends(self) -> Tensor:
        """The ends of the walks."""
        return sample(self.policy, self.noise, self.times, self.label)


def check_model(settings: CheckModel) -> Iterator[Finding]:
    """The findings, one by one.

    Raises:
        ConfigError: no such model, or settings that it cannot follow.
    """
    device = pick_device(settings.device)
    set_numerics(settings.threads, device)
    card = models.describe(settings.model, settings.pipeline, settings.chain.negative).first(settings.count + 1)
    denoiser = models.build(card, device=device) if card.pipeline else models.load(Path(settings.model))[0]
    if not card.pipeline or settings.lora:
        models.adapt(denoiser, card, settings.lora)
    denoiser = denoiser.to(device)
    chain = Chain(**vars(settings.chain) | {"steps": min(settings.steps, settings.chain.steps)})
    policy, times = chain.policy(denoiser, card.names), chain.times(denoiser)
    latent = denoiser.space.latent(card.shape)
    noise = chain_noise((settings.seed, "check"), range(settings.count), len(times) - 1, latent).to(device)
    label = torch.arange(settings.count, device=device) % card.classes
    trial = Trial(settings, card, denoiser, chain, policy, times, noise, label)
    for name, check in CHECKS.items():
        try:
            found = check(trial)
        except (ConfigError, RuntimeError, ValueError, ArithmeticError, TypeError) as error:
            found = Finding(name, "FAILS", f"{type(error).__name__}: {error}")
        if found is not None:
            yield found


def _verdict(fine: bool) -> Any:
    return "ok" if fine else "FAILS"


@torch.no_grad()
def _answers(trial: Trial) -> Finding:
    x, messages = trial.noise[:, 0], []
    for t in trial.times[[0, len(trial.times) // 2, -2]]:
        y = trial.denoiser.answer(x, t, _cond(trial))
        if y.shape != x.shape or not bool(y.isfinite().all()):
            return Finding(
                "answers", "FAILS", f"at t = {t:.3g}: {tuple(y.shape)} for x {tuple(x.shape)}, or not finite"
            )
        messages.append(f"{y.float().std():.3g}")
    return Finding("answers", "ok", f"{tuple(x.shape)}, of standard deviation {', '.join(messages)}")


def _cond(trial: Trial, label: Tensor | None = None) -> Any:
    """The condition as the bare denoiser takes it."""
    label = trial.label if label is None else label
    if trial.denoiser.weights is None:
        return label
    return {"label": label, "w": torch.full((len(label),), trial.chain.told, device=label.device)}


@torch.no_grad()
def _condition(trial: Trial) -> Finding:
    x, t = trial.noise[:, 0], trial.times[len(trial.times) // 2]
    known = trial.denoiser.own.conditions if trial.card.pipeline else None
    other = (trial.label + 1) % trial.card.classes
    if trial.card.classes == 1:
        if known is None or not known.negated:
            return Finding("condition", "note", "there is one condition alone")
        other = known.null(trial.label)
    moved = sampler_check.gap(
        trial.denoiser.answer(x, t, _cond(trial, other)), trial.denoiser.answer(x, t, _cond(trial))
    )
    return Finding(
        "condition", _verdict(moved > 1e-6), f"another prompt moves the answer by {moved:.2g} of the largest"
    )


@torch.no_grad()
def _batch(trial: Trial) -> Finding:
    x, t = trial.noise[:, 0], trial.times[len(trial.times) // 2]
    whole = trial.policy.denoiser(x, t, trial.label).x0
    alone = torch.cat([trial.policy.denoiser(x[i : i + 1], t, trial.label[i : i + 1]).x0 for i in range(len(x))])
    gap = sampler_check.gap(alone, whole)
    return Finding("batch", _verdict(gap <= trial.alike), f"alone and together differ by {gap:.2g} of the largest")


@torch.no_grad()
def _kind(trial: Trial) -> Finding:
    x0, eps = trial.ends(), trial.noise[:, 0].flip(0)
    t = trial.times[len(trial.times) // 2]
    l = level(trial.denoiser.schedule, t, x0)
    x = l.alpha.item() * x0 + l.sigma.item() * eps
    y = trial.denoiser.answer(x, t, _cond(trial))
    errors = {}
    for name, kind in {"its own": trial.denoiser.kind, **PLAIN}.items():
        try:
            errors[name] = (predict(solve(kind, l), y, x).eps - eps).square().mean().item()
        except ValueError:  # this kind is not defined at this level
            continue
    own, best = errors.pop("its own"), min(errors, key=errors.get)
    message = f"eps at t = {t:.3g} is off by {own:.3g} (1: knows nothing); read as {best!r}, by {errors[best]:.3g}"
    again = target(trial.denoiser.kind, x0, eps, l)
    fine = own < 1 and own <= errors[best] * 1.001 + 1e-9 and bool(again.isfinite().all())
    return Finding("kind", _verdict(fine), message)


@torch.no_grad()
def _decode(trial: Trial) -> Finding:
    space, x = trial.denoiser.space, trial.ends()
    pixels = space.decode(x)
    back = space.encode(pixels * 2 - 1)
    inside = bool(pixels.isfinite().all()) and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    fine = inside and tuple(pixels.shape[1:]) == trial.card.shape and back.shape == x.shape
    message = f"{tuple(pixels.shape)} in [{pixels.min():.3g}, {pixels.max():.3g}], encoded again {tuple(back.shape)}"
    return Finding("decode", _verdict(fine), message)


@torch.no_grad()
def _ratio(trial: Trial) -> Finding:
    gaps = []
    for step in walk(trial.policy, trial.noise, trial.times, trial.label):
        if bool((step.transition.std > 0).all()):
            obs = step.obs
            again = trial.policy(obs._replace(t=obs.t.expand(len(obs.x)), s=obs.s.expand(len(obs.x))))
            gaps.append((again.log_prob(step.x) - step.transition.log_prob(step.x)).abs().max().item())
    if not gaps:
        return Finding("ratio", "note", f"{trial.chain.kernel} has no noise: no likelihoods, no policy gradient")
    fine = max(gaps) < 0.02
    return Finding(
        "ratio", _verdict(fine), f"|log ratio| at most {max(gaps):.2g} nats before any update, below 0.02 wanted"
    )


@torch.no_grad()
def _noise(trial: Trial) -> Finding:
    chain = trial.settings.chain  # with all of its steps
    message = narrow(chain, trial.denoiser)
    if message:
        return Finding("noise", "note", message)
    stds = trial.policy.stds(chain.times(trial.denoiser)).tolist()
    return Finding("noise", "ok", f"{len(stds)} steps of standard deviation {', '.join(f'{s:.2g}' for s in stds)}")


def _gradient(trial: Trial) -> Finding:
    x, t = trial.noise[:1, 0], trial.times[-2]
    image = trial.denoiser.space.decode(trial.policy.denoiser(x, t, trial.label[:1]).x0)
    wanted = {name: p for name, p in trial.denoiser.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(image.mean(), list(wanted.values()), allow_unused=True)
    missing = [name for name, g in zip(wanted, found) if g is None]
    finite = all(bool(g.isfinite().all()) for g in found if g is not None)
    norm = sum(g.double().square().sum().item() for g in found if g is not None) ** 0.5
    message = f"of {len(wanted)} tensors {len(wanted) - len(missing)} have one, norm {norm:.3g}"
    if missing:
        message += f"; none: {', '.join(missing[:3])}"
    return Finding("gradient", _verdict(finite and norm > 0 and len(missing) < len(wanted)), message)


def _guidance(trial: Trial) -> Finding:
    return sampler_check.guidance(trial.chain, trial.denoiser)


@torch.no_grad()
def _sampler(trial: Trial) -> Finding | None:
    if not trial.card.pipeline:
        return None
    return sampler_check.sampler(trial.chain, trial.denoiser, trial.card, trial.noise, trial.label, trial.alike)


CHECKS: dict[str, Callable[[Trial], Finding | None]] = {
    "answers": _answers,
    "condition": _condition,
    "batch": _batch,
    "kind": _kind,
    "decode": _decode,
    "ratio": _ratio,
    "noise": _noise,
    "gradient": _gradient,
    "guidance": _guidance,
    "sampler": _sampler,
}
