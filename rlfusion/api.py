"""The public functions on models: load, save, sample. ``import rlfusion as rlf`` has them; what is not named there may
change. Those that need a reward or a judge are in ``judging``.

A ``Model`` is a denoiser, the card that describes it and its sampling chain. Where a model is asked for, the path of
one does as well. Samples are tensors (B, C, H, W) in [0, 1]; labels are classes or prompts, by name or by number.
Nothing here installs a signal handler, changes a setting of torch, or writes a file that is not asked for.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common import spec
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.policy import Policy
from rlfusion.jobs.measure import draw
from rlfusion.models import lora, pipelines
from rlfusion.nets.captions import Captions
from rlfusion.nets.guidance import Guidance
from rlfusion.training.devices import pick_device

ChainLike = Chain | Mapping[str, Any] | None
Labels = str | int | Sequence[str] | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Model:
    """A denoiser with what is needed to sample it.

    Attributes:
        denoiser: (x_t, t, cond) -> Prediction(x0, eps).
        card: the architecture, the shape (C, H, W) of a sample, the names of the classes or the prompts.
        chain: the sampling chain: steps, kernel, guidance. A loaded model has the one that it was saved with.
    """

    denoiser: Denoiser
    card: models.Card
    chain: Chain = field(default_factory=Chain)

    @classmethod
    def of(
        cls,
        denoiser: Denoiser,
        shape: Sequence[int],
        classes: int | Sequence[str] = 1,
        chain: ChainLike = None,
        net: str = "",
    ) -> "Model":
        """A model around a denoiser of your own, ``rlf.Denoiser(net, schedule, kind)``.

        Args:
            denoiser: its ``net(x, t, cond)`` is given x (B, C, H, W), t (B,) and labels (B,) int64 in 0..classes-1.
            shape: (C, H, W) of a sample.
            classes: how many there are, or their names.
            chain: a ``Chain``, or some of its settings.
            net: what makes such a network of (shape, classes), such as "path/to/file.py:Net(width=32)" or
                "package.module:Net"; ``save`` needs it.

        Raises:
            ConfigError: a shape that is none, no class, or an unknown setting of the chain.
        """
        names = tuple(map(str, range(classes))) if isinstance(classes, int) else tuple(classes)
        if len(shape) != 3 or min(shape) < 1 or not names:
            raise ConfigError(
                f"shape, classes = {tuple(shape)}, {classes!r}: expected (C, H, W) and at least one class"
            )
        made = chain_of(chain, {})
        config = models.Config(net, repr(denoiser.schedule), str(denoiser.kind))
        return cls(denoiser, models.Card(config, tuple(shape), names, asdict(made)), made)

    @cached_property
    def policy(self) -> Policy:
        """The denoiser under the chain's kernel and guidance: observation in, Gaussian over the next latent out."""
        return self.chain.policy(self.denoiser, self.card.names)

    @cached_property
    def times(self) -> Tensor:
        """The K + 1 falling times of the chain, float64, on the CPU."""
        return self.chain.times(self.denoiser)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a sample."""
        return self.card.shape

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, or the prompts."""
        return self.card.names

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.denoiser.parameters()).device


ModelLike = str | os.PathLike[str] | Model


def load(
    path: str | os.PathLike[str],
    *,
    prompts: str | Sequence[str] = "",
    chain: ChainLike = None,
    device: str = "auto",
    pipeline: Mapping[str, Any] | None = None,
) -> Model:
    """The model in a folder: of a run, of a saved model, or of a diffusers pipeline (or its name on the hub).

    Args:
        path: the folder, or the name.
        prompts: of a pipeline: a prompt, a file of prompts, or several of them.
        chain: settings of the chain to change, or a whole ``Chain``; by default that of the model.
        device: "cpu", "cuda", or "auto" (cuda where there is one).
        pipeline: further settings of a pipeline: size, dtype, variant, ... (docs/models.md).

    Raises:
        ConfigError: no model there, a damaged one, or settings that do not fit it.
    """
    return opened(path, prompts, chain, device, pipeline)


def opened(
    path: str | os.PathLike[str],
    prompts: str | Sequence[str],
    chain: ChainLike,
    device: str,
    pipeline: Mapping[str, Any] | None,
    training: bool = False,
) -> Model:
    """``load``; for ``training`` a pipeline has noise at every step, and no more steps than one trains with."""
    name, several = os.fspath(path), [prompts] if isinstance(prompts, str) else list(prompts)
    settings = spec.call(pipelines.Settings, {"prompts": several[0] if several else "", **(pipeline or {})}, "pipeline")
    if pipelines.is_pipeline(name):
        own = pipelines.defaults(name, training, settings)
    else:
        card = models.load_card(Path(name))
        if settings != pipelines.Settings() and not card.pipeline:
            raise ConfigError(
                f"prompts and pipeline are given, and {name!r} is no pretrained pipeline: expected neither"
            )
        own = card.chain
    made, on = chain_of(chain, own), pick_device(device)
    card = models.describe(name, settings, made.negative)
    if len(several) > 1:
        card = _asked(card, several, made.negative)
    denoiser = models.build(card, device=on) if card.pipeline else models.load(Path(name))[0]
    return Model(denoiser.to(on), card, made)


def _asked(card: models.Card, prompts: Sequence[str], negative: str) -> models.Card:
    """The card of a pipeline with these prompts, or files of them."""
    held = [pipelines.read_prompts(one, negative) for one in prompts]
    about = {
        "negatives": [text for one in held for text in one.negatives],
        "metadata": [row for one in held for row in one.metadata or ({},) * len(one.texts)],
    }
    texts = tuple(text for one in held for text in one.texts)
    return replace(card, names=texts, pipeline=card.pipeline | about)


def chain_of(chain: ChainLike, own: Mapping[str, Any]) -> Chain:
    """A chain as it is given; or a model's ``own`` with some of its settings changed.

    Raises:
        ConfigError: an unknown setting, or a value that it cannot have.
    """
    return chain if isinstance(chain, Chain) else spec.call(Chain, {**own, **(chain or {})}, "chain")


def save(model: Model, folder: str | os.PathLike[str]) -> None:
    """Write a model folder, which ``load``, ``--base`` and ``rlfusion sample`` read. Adapters are merged.

    Raises:
        ConfigError: a network that the name in its card does not make again.
        StorageError: the folder cannot be written.
    """
    if not model.card.pipeline:
        _require_built_again(model)
    models.save(Path(folder), model.denoiser, replace(model.card, chain=asdict(model.chain)))


def _require_built_again(model: Model) -> None:
    """Refuse a model whose card does not make its network."""
    if not (net := model.card.config.net):
        raise ConfigError(
            "the network has no name by which it is found again: expected Model.of(..., net='path/to/file.py:Net'), or "
            "torch.save(model.denoiser.state_dict(), ...)"
        )
    made, held = models.build(model.card).state_dict(), lora.merged(model.denoiser).state_dict()
    shapes = [{name: value.shape for name, value in state.items()} for state in (made, held)]
    if shapes[0] != shapes[1]:
        name = min(set(shapes[0].items()) ^ set(shapes[1].items()), key=str)[0]
        raise ConfigError(f"net = {net!r} makes another network: its {name!r} is not that of the model")


def model_of(model: ModelLike) -> Model:
    """A model, or the one in a folder."""
    return model if isinstance(model, Model) else load(model)


def sample(
    model: ModelLike, labels: Labels = None, *, seed: int = 0, count: int | None = None, chain: ChainLike = None
) -> Tensor:
    """Draw samples, (B, C, H, W) in [0, 1], without gradients, on the model's device.

    Sample i depends on the seed, on i and on its label alone, whatever B is; ``rlfusion sample`` draws the same.

    Args:
        model: a model, or the path of one.
        labels: classes or prompts, by name or number (0 to classes - 1): one for all samples, or several in turn.
            None: all that the model knows, in turn. A model that reads captions takes any text.
        seed: keys the noise.
        count: B; by default as many as ``labels``.
        chain: settings of the chain to change, such as {"steps": 10, "kernel": "DDIM(eta=0.0)"}.

    Raises:
        ConfigError: an unknown label, a count below 1, or a chain that cannot work.
    """
    held = model_of(model)
    if chain is not None:
        held = replace(held, chain=chain_of(chain, asdict(held.chain)))
    numbers, names = _numbers(held, labels)
    count = len(numbers) if count is None else count
    if type(count) is not int or count < 1:
        raise ConfigError(f"count = {count!r}: expected a whole number, at least 1")
    label = torch.tensor([numbers[i % len(numbers)] for i in range(count)], device=held.device)
    if names == held.names:
        return draw(held.policy, held.times, label, held.shape, seed, "sample")
    captions = cast(Captions | Guidance, held.denoiser.net.label)
    captions.set(names)
    try:
        policy = held.chain.policy(held.denoiser, names)
        return draw(policy, held.times, label, held.shape, seed, "sample")
    finally:
        captions.set(held.names)


def _numbers(model: Model, labels: Labels) -> tuple[list[int], tuple[str, ...]]:
    """The number of each label, and the names that they count: the model's, and captions that it has not seen."""
    names = list(model.names)
    if labels is None:
        return list(range(len(names))), model.names
    held = labels.tolist() if isinstance(labels, Tensor) else labels
    given = list(held) if isinstance(held, Sequence) and not isinstance(held, str) else [held]
    if not given:
        raise ConfigError("labels = []: expected one at least, or None for all")
    numbers = []
    for label in given:
        if isinstance(label, str) and label not in names and model.card.captioned:
            names.append(label)
        if isinstance(label, str) and label not in names:
            raise unknown("label", label, names)
        number = names.index(label) if isinstance(label, str) else label
        if type(number) is not int or not 0 <= number < len(names):
            raise ConfigError(f"label {label!r}: expected a name, or a whole number in 0..{len(names) - 1}")
        numbers.append(number)
    return numbers, tuple(names)
