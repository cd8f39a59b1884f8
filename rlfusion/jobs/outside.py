"""What a learner opens by name, of a fine-tuning: teachers, as policies over the run's own chain; and stored images, as
latents of its prompts.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common import shards
from rlfusion.common.errors import ConfigError, shorten, unknown
from rlfusion.common.hollow import is_hollow
from rlfusion.common.notices import say_once
from rlfusion.common.tensors import grey
from rlfusion.common.weights import sha256
from rlfusion.data import Dataset
from rlfusion.data.sources import absolute
from rlfusion.data.stored import StoredImages, read
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser, Denoising, Embedded, Guided
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.jobs.parts import BaseSpec
from rlfusion.models import pipelines
from rlfusion.rollout.outside import Stored
from rlfusion.training.ranks import current

CHUNK = 256
"""Images that are encoded at a time."""


@dataclass(frozen=True)
class Opened:
    """An ``Outside`` of a run whose model, with this ``card``, is ``policy`` over ``chain``; ``inputs`` are the digests
    of what was opened, by setting.
    """

    base: BaseSpec
    chain: Chain
    card: models.Card
    policy: Policy
    inputs: dict[str, str] = field(default_factory=dict)

    def teacher(self, model: str, guidance: float | None) -> Policy:
        """As ``Outside.teacher``.

        Raises:
            ConfigError: no such model; or its prompts, its latents or its noise levels are others than the student's.
        """
        chain = self.chain if guidance is None else guided(self.chain, guidance)
        if not model:
            own = frozen_copy(Policy(_within(self.policy.denoiser, self.card), self.policy.kernel)).denoiser
            return self._frozen(own, chain)
        denoiser, card = self._load(model)
        self._require_alike(f"teacher = {model!r}", denoiser, card)
        if not pipelines.is_pipeline(model):
            self.inputs["agent.teacher"] = models.digest(Path(model))
        return self._frozen(denoiser, chain)

    def stored(self, data: str) -> Stored:
        """As ``Outside.stored``; what was read is told once.

        Raises:
            ConfigError: no such data, or of a shape, a class or a prompt that the model does not have.
        """
        found = self._to_learn(data, read_for(data, self.card))
        prompt = prompts_of(data, found.data, self.card)
        say_once(f"agent.data {data!r}: {found.data.summary or f'{len(found.data):,} samples'}")
        score = b"" if found.score is None else found.score.numpy().tobytes()
        self.inputs["agent.data"] = sha256(found.data.sha256.encode() + score)
        with torch.no_grad():
            parts = [self.policy.space.encode(part.to(self._device)).cpu() for part in found.data.x.split(CHUNK)]
        return Stored(torch.cat(parts), prompt, found.score, found.pairs)

    def _to_learn(self, data: str, found: StoredImages) -> StoredImages:
        """Without the samples that are held out: by the data themselves, or of the base's own data by its training."""
        own = not self.card.pipeline and absolute(data) == absolute(self.base.pretrain.data) and found.score is None
        if found.data.held is None and not own:
            return found
        learned, _ = found.data.split(self.base.pretrain.held_out)
        return replace(found, data=learned)

    def _load(self, model: str) -> tuple[Denoiser, models.Card]:
        """The teacher, that of a pipeline with the student's prompts, size and precision and no adapters of others. It
        is split over the ranks where the student is, and has no weights where that has none.
        """
        settings = replace(self.base.pipeline, adapters="", adapters_sha256="")
        try:
            card = models.describe(model, settings, self.base.negative, self.base.root / "cache")
            if shards.roots(self.policy) or self._is_outline:
                return self._load_hollow(model, card), card
            denoiser = models.build(card, device=self._device) if card.pipeline else models.load(Path(model))[0]
        except ConfigError as error:
            raise ConfigError(f"teacher: {error}") from error
        self.base.arithmetic.act(denoiser, card)
        return denoiser.to(self._device), card

    def _load_hollow(self, model: str, card: models.Card) -> Denoiser:
        held = models.build_hollow(card, self._device) if card.pipeline else models.load_hollow(Path(model))
        self.base.arithmetic.act(held.denoiser, card)
        if not self._is_outline:
            held.denoiser.requires_grad_(False)
            shards.split(held.denoiser.net, self._device, current().exact, held.filling)
            held.denoiser.to(self._device)
        return held.denoiser

    @property
    def _device(self) -> torch.device:
        return torch.device("cpu") if self._is_outline else next(self.policy.parameters()).device

    @property
    def _is_outline(self) -> bool:
        """Whether the student has no weights: in a check of a job that will split it."""
        return is_hollow(self.policy)

    def _frozen(self, denoiser: Denoising, chain: Chain) -> Policy:
        policy = chain.policy(denoiser, self.card.names)  # type: ignore[arg-type]
        return policy.requires_grad_(False).eval()

    def _require_alike(self, what: str, denoiser: Denoiser, card: models.Card) -> None:
        """Refuse a teacher whose answers to the student's states would be of something else."""
        if card.names != self.card.names:
            raise ConfigError(
                f"{what}: it is of {_listed(card.names)}, expected those of the student, {_listed(self.card.names)}"
            )
        space, theirs = self.policy.space, denoiser.space
        ours, sides = space.latent(self.card.shape), theirs.latent(card.shape)
        if ours != sides:
            raise ConfigError(f"{what}: its latents are {sides}, expected those of the student, {ours}")
        times = self.chain.times(_within(self.policy.denoiser, self.card))
        level, other = self.policy.schedule(times), denoiser.schedule(times)
        if not (torch.equal(level.alpha, other.alpha) and torch.equal(level.sigma, other.sigma)):
            raise ConfigError(
                f"{what}: its schedule is {shorten(denoiser.schedule)}, expected the noise levels of the student's, "
                f"{shorten(self.policy.schedule)}"
            )
        ramp = _ramp(self.card.shape)
        if not torch.allclose(space.encode(ramp), theirs.encode(ramp), rtol=1e-3, atol=1e-3):
            raise ConfigError(f"{what}: its autoencoder is another one than the student's, expected the same latents")


def read_for(data: str, card: models.Card) -> StoredImages:
    """The images that a learner's ``data`` names, for a model of this card; grey ones, for a model of one channel, have
    one, though pictures are read in three.

    Raises:
        ConfigError: no such data, or of a shape, a class or a prompt that the model does not have.
    """
    if not data:
        raise ConfigError("agent.data = '': expected a folder or a table of images to learn from")
    found = read(data, card.shape[-1])
    found = replace(found, data=replace(found.data, x=grey(found.data.x, card.shape[0])))
    if found.data.shape != card.shape:
        raise ConfigError(
            f"agent.data = {data!r} holds samples of {_sides(found.data.shape)}, the model draws {_sides(card.shape)}: "
            "expected the same"
        )
    prompts_of(data, found.data, card)
    return found


def outline_of(data: str, card: models.Card) -> Stored:
    """What ``Opened.stored`` gives of a pipeline's stored images, without their latents: each is one 0.

    Raises:
        ConfigError: as ``read_for``.
    """
    found = read_for(data, card)
    prompt = prompts_of(data, found.data, card)
    return Stored(torch.zeros(len(prompt), 1), prompt, found.score, found.pairs)


def prompts_of(data: str, found: Dataset, card: models.Card) -> Tensor:
    """The number (N,) of each sample's prompt or class among those of a model.

    Raises:
        ConfigError: the model has no such.
    """
    place = {unicodedata.normalize("NFC", name): i for i, name in reversed(list(enumerate(card.names)))}
    there = sorted(set(found.label.tolist()))
    if strange := [found.names[i] for i in there if found.names[i] not in place]:
        what = "prompts (of pipeline.prompts)" if card.pipeline else "classes"
        raise ConfigError(
            f"agent.data = {data!r}: {len(strange)} of {len(there)} are none of the model's {what}: "
            f"{unknown('prompt', strange[0], place)}"
        )
    return torch.tensor([place.get(name, -1) for name in found.names])[found.label]


def guided(chain: Chain, weight: float) -> Chain:
    """The chain under the guidance ``weight``; without any, nothing else of guidance is left."""
    if weight:
        return replace(chain, guidance=weight, guidance_scale=None)
    none = {"guidance_rescale": 0.0, "guidance_low": 0.0, "guidance_high": 1.0, "negative": ""}
    return replace(chain, guidance=0.0, guidance_scale=None, **none)


def _within(denoiser: Denoising, card: models.Card) -> Denoiser:
    """The denoiser as it was built, without guidance and what its sampler puts around it."""
    while isinstance(denoiser, Guided | Embedded) or (card.pipeline and not isinstance(denoiser, Denoiser)):
        denoiser = denoiser.denoiser  # type: ignore[attr-defined]
    return denoiser  # type: ignore[return-value]


def _ramp(shape: tuple[int, ...]) -> Tensor:
    """A sample (1, *shape) that no two autoencoders are likely to encode alike."""
    return torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(1, *shape)


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({shorten(', '.join(names))})"
