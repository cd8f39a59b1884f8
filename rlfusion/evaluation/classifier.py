"""Training, saving and caching the small classifiers of ``rlfusion.nets.classifier``.

    min over theta of  E[ -log softmax(f_theta(shift(x) + noise))_label ]          AdamW, averaged weights (EMA)

Training is a pure function of the data and the settings: every draw is keyed by the seed, on one CPU thread, so two
trainings on one machine give the same bits. Presets and the held-out accuracy that they should reach on
``digits().split(0.25)``, over seeds: ``REWARD`` (MLP) 0.97, ``JUDGE`` (ConvNet) 0.98.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor
from torch.nn import functional as F

from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, require_decay, require_not_negative, require_positive
from rlfusion.common.seeding import integer, stream
from rlfusion.common.weights import sha256
from rlfusion.data import Dataset, batch_indices, to_pixels
from rlfusion.data.augment import shifted
from rlfusion.nets.classifier import Classifier
from rlfusion.training import optimizers
from rlfusion.training.optimization import Optimization

FORMAT = 1
"""Rises when training changes, so that classifiers cached before are not taken for new ones."""


@dataclass(frozen=True)
class Config:
    """Settings of a training.

    Attributes:
        kind: architecture, "mlp" or "conv".
        steps: optimiser steps.
        batch: images a step.
        lr: learning rate.
        weight_decay: of the optimizer.
        optimizer: adamw, sgd(momentum=...), adamw8bit, or any torch.optim.Optimizer as package.module:Class or
            path/to/file.py:Class, its arguments in brackets.
        warmup: steps over which the learning rate rises from 0.
        ema_decay: decay of the averaged weights that are kept.
        shift: images are shifted by up to this many pixels each way, edges repeated.
        noise: standard deviation of the Gaussian noise added to the pixels.
        seed: keys every draw.
    """

    kind: str = "mlp"
    steps: int = 1000
    batch: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    warmup: int = 0
    ema_decay: float = 0.99
    shift: int = 1
    noise: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "lr")
        require_not_negative(self, "shift", "noise", "weight_decay", "warmup")
        optimizers.settle(self)
        require_decay(self.ema_decay)


REWARD = Config(kind="mlp")
JUDGE = Config(kind="conv", steps=600)


def train(data: Dataset, config: Config) -> Classifier:
    """A classifier of ``data``, in eval mode, its parameters without gradient.

    Raises:
        ConfigError: the data's shape or number of classes does not suit the architecture.
        NumericalError: a gradient was not finite.
    """
    with one_thread():
        module = _initial(data, config)
        optimization = Optimization(
            module,
            config.lr,
            config.weight_decay,
            ema=config.ema_decay,
            optimizer=config.optimizer,
            warmup=config.warmup,
        )
        pixels = to_pixels(data.x)
        for step in range(config.steps):
            at = torch.from_numpy(batch_indices(len(data), config.batch, step, config.seed, "classifier"))
            x = augment(pixels[at], config.shift, config.noise, stream(config.seed, "classifier", "augment", step))
            F.cross_entropy(module(x), data.label[at]).backward()
            optimization.step()
        with optimization.ema.averaged():
            return copy.deepcopy(module).eval().requires_grad_(False)


@torch.no_grad()
def accuracy(module: Classifier, data: Dataset) -> float:
    """The share of ``data`` that the classifier gets right."""
    return (module(to_pixels(data.x)).argmax(1) == data.label).double().mean().item()


def augment(x: Tensor, shift: int, noise: float, draw: np.random.Generator) -> Tensor:
    """(B, C, H, W) -> same shape: each image moved by its own whole number of pixels, plus noise."""
    moved = shifted(x, shift, draw)
    return moved + noise * torch.from_numpy(draw.standard_normal(tuple(x.shape), dtype=np.float32))


@contextmanager
def one_thread() -> Iterator[None]:
    """Within the context torch computes on one thread: sums are then always in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _initial(data: Dataset, config: Config) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(integer(config.seed, "classifier", config.kind))
        return Classifier(config.kind, data.shape, data.classes)


def save(module: Classifier, path: Path, of: str = "") -> None:
    """Write weights and architecture as safetensors: to a temporary name, then renamed; ``of`` is its fingerprint."""
    storage.make_folder(path.parent)
    about = {"kind": module.kind, "shape": module.shape, "classes": module.classes, "of": of}
    about["sha256"] = _digest(module.state_dict())
    storage.write(path, serialized(module.state_dict(), metadata={"classifier": json.dumps(about)}))


def load(path: Path) -> Classifier:
    """The classifier that ``save`` wrote, on the CPU, in eval mode, its parameters without gradient.

    Raises:
        ConfigError: no such file, one that cannot be read, or one that is no classifier.
    """
    if not path.is_file():
        raise ConfigError(f"classifier file {str(path)!r} does not exist")
    try:
        with safe_open(path, framework="pt") as held:
            metadata = held.metadata() or {}
            state = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"classifier file {str(path)!r} cannot be read: {error}") from error
    if "classifier" not in metadata:
        raise ConfigError(f"{str(path)!r} holds no classifier: its metadata has {sorted(metadata)}, not 'classifier'")
    try:
        about = json.loads(metadata["classifier"])
        if about.get("sha256", _digest(state)) != _digest(state):
            raise ConfigError(f"classifier file {str(path)!r} is damaged: its weights do not match their SHA-256")
        module = Classifier(about["kind"], tuple(about["shape"]), about["classes"])
        module.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise ConfigError(f"classifier file {str(path)!r} cannot be read: {type(error).__name__}: {error}") from error
    return module.eval().requires_grad_(False)


def cached(data: Dataset, config: Config, root: Path) -> Path:
    """The file of the classifier of ``data`` under ``<root>/cache``; trained and written there if it is not yet.

    The name holds a hash of the settings and of the data themselves, so another data set never meets an old
    classifier. A file that cannot be read is replaced, with a warning.
    """
    of = fingerprint(data, config)
    path = root / "cache" / f"classifier-{config.kind}-{of}.safetensors"
    if path.is_file():
        try:
            load(path)
            if _trained_as(path) == of:
                return path
            warnings.warn(f"classifier file {str(path)!r} is of other data; it is trained again", stacklevel=2)
        except ConfigError as error:
            warnings.warn(f"{error}; it is trained again", stacklevel=2)
    save(train(data, config), path, of)
    return path


def _trained_as(path: Path) -> str:
    """The fingerprint that a classifier's file states."""
    with safe_open(path, framework="pt") as held:
        return json.loads(held.metadata()["classifier"]).get("of", "")


def _digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of weights."""
    return sha256(serialized({name: state[name].contiguous() for name in sorted(state)}))


def fingerprint(data: Dataset, config: Config) -> str:
    """16 hex digits of SHA-256 over the settings, the images, the labels and the names of the classes."""
    digest = hashlib.sha256(json.dumps([FORMAT, asdict(config), data.names, data.shape]).encode())
    for part in (data.x, data.label):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
