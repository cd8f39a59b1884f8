"""Models: how a denoiser is described, built, saved and loaded.

A model folder holds ``weights.safetensors`` and ``model.json``: everything that is needed to build the denoiser again,
and the SHA-256 of the weights. (A ``model.json`` written by hand may leave that out.)
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from rlfusion.common import spec, storage
from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import integer
from rlfusion.common.weights import pack, read_file, sha256, unpack
from rlfusion.diffusion import schedule
from rlfusion.diffusion.consistency import LCM
from rlfusion.diffusion.denoiser import Answers, Denoiser
from rlfusion.diffusion.space import Pixels, Space
from rlfusion.models import autoencoder, lora, pipelines
from rlfusion.models.autoencoder import Latents
from rlfusion.nets.captions import Captions
from rlfusion.nets.dit import DiT
from rlfusion.nets.guidance import Guidance
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.points import Points
from rlfusion.nets.unet import UNet

FORMAT, UNSEALED = "rlfusion-model-2", "rlfusion-model-1"
"""``model.json`` as it is written, with a digest of itself, and as earlier versions wrote it, without."""

KINDS: Mapping[str, type | tuple[type, ...]] = {
    **{"config": dict, "shape": list, "names": list, "chain": dict, "captioned": bool, "autoencoder": dict},
    **{"boundary": str, "weights": list, "answers": str, "pipeline": dict},
}
"""What the entries of a card are as JSON."""

PER_PROMPT = ("negatives", "metadata")
"""What a pipeline's card keeps of each prompt, beside its text."""

SCHEDULES: Mapping[str, Callable[..., schedule.Schedule]] = {
    "DDPM": schedule.DDPM,
    "ScaledLinear": schedule.ScaledLinear,
    "VP": schedule.VP,
    "Cosine": schedule.Cosine,
    "ZeroSNR": schedule.ZeroSNR,
    "Rectified": schedule.Rectified,
    "Trig": schedule.Trig,
    "Karras": schedule.Karras,
    "Geometric": schedule.Geometric,
}
NETS: Mapping[str, Callable[..., nn.Module]] = {"ResidualMLP": ResidualMLP, "UNet": UNet, "DiT": DiT, "Points": Points}


@dataclass(frozen=True)
class Config:
    """Architecture of a denoiser trained here.

    Attributes:
        net: the network, ResidualMLP(width=..., depth=...), UNet(width=..., multipliers=..., depth=..., attention=...)
            or DiT(patch=..., width=..., depth=..., heads=...); the last two take recompute=True, to save memory.
        schedule: the noise schedule, one of DDPM(), ScaledLinear(), VP(), Cosine(), ZeroSNR(base=...), Rectified(),
            Trig(), Karras(), Geometric().
        kind: what the network predicts: x0, eps, v, v_handbook, score, flow, InstaFlow(), TrigFlow(sigma_data=...),
            EDM(sigma_data=...) or CM(sigma_data=..., t_min=...).
    """

    net: str = "ResidualMLP(width=128, depth=3)"
    schedule: str = "Cosine()"
    kind: str = "x0"


@dataclass(frozen=True)
class Card:
    """What a model folder says of its model: the architecture, the shape (C, H, W) of a sample, the classes' names, the
    settings of the chain that it was made with (``chain.Chain``; empty for none in particular), whether the names are
    captions, which the network reads, and the autoencoder in whose latents it works (``autoencoder.build``; empty for
    pixels). Of a distilled model also the boundary of a consistency function around it (``LCM(...)``; empty for none)
    and the range (low, high) of guidance weights that the network reads (empty for none). ``answers`` says what x0_hat
    is, the mean or the end of a walk. ``pipeline`` says which pretrained pipeline it is, if it is one
    (``pipelines.model``); its names are prompts.
    """

    config: Config
    shape: tuple[int, ...]
    names: tuple[str, ...]
    chain: dict[str, Any] = field(default_factory=dict)
    captioned: bool = False
    autoencoder: dict[str, Any] = field(default_factory=dict)
    boundary: str = ""
    weights: tuple[float, ...] = ()
    answers: Answers = "mean"
    pipeline: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def metadata(self) -> tuple[Mapping[str, Any], ...]:
        """What else is known of each prompt of a pipeline; () for nothing."""
        return tuple(self.pipeline.get("metadata", ()))

    def first(self, count: int) -> "Card":
        """The card with the first ``count`` of a pipeline's prompts alone, for what asks for no others."""
        return self._of(slice(count))

    def only(self, name: str) -> "Card":
        """The card with one of a pipeline's prompts alone, the first of that text."""
        at = self.names.index(name)
        return self._of(slice(at, at + 1))

    def _of(self, rows: slice) -> "Card":
        if not self.pipeline:
            return self
        kept = {name: held[rows] for name in PER_PROMPT if (held := self.pipeline.get(name))}
        return replace(self, names=self.names[rows], pipeline=self.pipeline | kept)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads back, sharing what is held."""
        return {**vars(self), "config": asdict(self.config)}

    @classmethod
    def from_json(cls, card: dict) -> "Card":
        """The card whose ``asdict`` went through JSON; other keys are ignored.

        Raises:
            KeyError, TypeError: it is none; the entry is named.
        """
        for name, kind in KINDS.items():
            if name in card and not isinstance(card[name], kind):
                raise TypeError(f"{name} = {card[name]!r}")
        texts = [*card["config"].values(), *card["names"]]
        sides = [*card["shape"], *card.get("weights", ())]
        if not all(isinstance(text, str) for text in texts) or not all(type(side) in (int, float) for side in sides):
            raise TypeError("expected texts in config and names, numbers in shape and weights")
        if not card["shape"] or not all(type(side) is int and side > 0 for side in card["shape"]):
            raise TypeError(f"shape = {card['shape']!r}")
        known = ("chain", "captioned", "autoencoder", "boundary", "answers", "pipeline")
        own = {name: card[name] for name in known if name in card}
        own["weights"] = tuple(card.get("weights", ()))
        return cls(Config(**card["config"]), tuple(card["shape"]), tuple(card["names"]), **own)


def build(card: Card, seed: int = 0, device: torch.device | str = "cpu") -> Denoiser:
    """A denoiser with initial weights keyed by ``seed``; of a pretrained pipeline, with its own, and with prompts that
    are encoded on ``device``.

    Raises:
        ConfigError: an unknown network, schedule, kind or setting of one.
    """
    if card.pipeline:
        return pipelines.build(card.pipeline, card.names, device)
    config = card.config
    space = autoencoder.build(card.autoencoder) if card.autoencoder else Pixels()
    with initial(seed):
        net = make_net(config.net, space.latent(card.shape), card.classes)
        width = net.label.embedding_dim
        if card.captioned:
            net.label = Captions(card.names, width)
        if card.weights:
            net.label = Guidance(net.label, width)
    denoiser = Denoiser(net, spec.parse(config.schedule, SCHEDULES, "schedule"), config.kind)
    denoiser.space, denoiser.weights = space, card.weights or None
    if card.boundary:
        return spec.parse(card.boundary, {"LCM": partial(LCM, denoiser)}, "boundary")
    return denoiser


@contextmanager
def initial(seed: int) -> Iterator[None]:
    """Within the context torch's global generator gives the initial weights of ``seed``; it is then as before."""
    state = torch.get_rng_state()
    torch.manual_seed(integer(seed, "initial weights"))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def make_net(text: str, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that a text like ``ResidualMLP(width=128, depth=3)`` writes, for x (B, *shape).

    Raises:
        ConfigError: an unknown network or setting of one.
    """
    name, settings = spec.split(text)
    given = {"shape": shape, "classes": classes}
    if settings.keys() & given:
        raise ConfigError(f"net = {text!r}: shape and classes come from the data, expected other settings")
    return spec.call(spec.lookup(NETS, name, "network"), {**settings, **given}, f"network {name!r}")


def of_pipeline(name: str, settings: pipelines.Settings, negative: str, cache: Path | None) -> Card:
    """The card of a pretrained pipeline by its folder or hub id.

    Raises:
        ConfigError: no such pipeline, one that is not known, no prompts, or a size that does not fit.
    """
    about, texts = settings.about(name, negative, cache)
    path = pipelines.folder(name, settings.variant)
    config = Config(pipelines.index(path)["_class_name"], pipelines.index(path)["scheduler"][1], "of the scheduler")
    return Card(config, pipelines.shape(path, settings.size), texts, pipeline=about)


def describe(name: str, settings: pipelines.Settings, negative: str = "", cache: Path | None = None) -> Card:
    """The card of a model folder, of a run's, or of a pretrained pipeline by its folder or hub id.

    ``settings`` give a pipeline its prompts; of a saved one they replace those that it was trained on.

    Raises:
        ConfigError: there is no such model, or the settings do not fit it.
    """
    if pipelines.is_pipeline(name):
        return of_pipeline(name, settings, negative, cache)
    card = load_card(Path(name))
    if not card.pipeline or not settings.prompts:
        return card
    about, texts = settings.prompted(negative)
    return replace(card, names=texts, pipeline=card.pipeline | about)


def require_trainable(card: Card) -> None:
    """Raise ConfigError where all weights of a pipeline cannot be trained: in low precision."""
    if (dtype := card.pipeline["dtype"]) != "float32":
        raise ConfigError(f"dtype = {dtype}: whole weights are trained in float32, expected that or adapters (lora)")


def adapt(denoiser: Denoiser, card: Card, text: str, seed: int = 0) -> None:
    """Give a model the adapters of ``text`` (none for ""); a pretrained one, unless told otherwise, in its attention.

    Raises:
        ConfigError: as ``lora.attach``; or frozen weights of low precision, with nothing else to train.
    """
    if not card.pipeline:
        lora.attach(denoiser.net, text, seed)
        return
    if not text:
        require_trainable(card)
    net = denoiser.net
    lora.attach(net.model, text, seed, net.family.targets, net.family.idle(net.model))


def space_blob(space: Space) -> dict[str, bytes]:
    """{"space": the autoencoder's weights}, or nothing for pixels."""
    return {"space": pack(space.module.state_dict())} if isinstance(space, Latents) else {}


def load_space(denoiser: Denoiser, blob: bytes | None) -> None:
    """Give a built denoiser the weights of its autoencoder; None for pixels."""
    if blob is not None:
        denoiser.space.module.load_state_dict(unpack(blob))


def save(folder: Path, denoiser: nn.Module, card: Card) -> None:
    """Write a model folder, with its autoencoder if it has one; each file appears whole or not at all. Adapters are
    merged into the weights, and kept beside them; of a pretrained pipeline diffusers' own files are written.
    """
    storage.make_folder(folder)
    if card.pipeline:

        def write() -> dict[str, Any]:
            try:
                return pipelines.save(folder, denoiser.net, denoiser.space, card.pipeline)
            except SafetensorError as error:
                raise OSError(*storage.told(str(error))) from error

        made = replace(card, pipeline=storage.patiently(write, folder))
        files = {name: _digest(folder / name) for name in _files(folder)}  # of diffusers
        storage.write(folder / "model.json", sealed({"format": FORMAT, **made.to_json(), "files": files}))
        return
    denoiser = lora.merged(denoiser)
    blob, space = pack(denoiser.state_dict()), space_blob(denoiser.space)
    about = {"format": FORMAT, **card.to_json(), "sha256": sha256(blob)}
    about |= {f"{name}_sha256": sha256(content) for name, content in space.items()}
    contents = {f"{name}.safetensors": content for name, content in {"weights": blob, **space}.items()}
    for name, content in (contents | {"model.json": sealed(about)}).items():
        storage.write(folder / name, content)


def sealed(about: dict[str, Any]) -> bytes:
    """A description as JSON, with a digest of itself."""
    return json.dumps({**about, "seal": sha256(json.dumps(about).encode())}, indent=1).encode()


def require_seal(held: dict[str, Any], file: Path) -> None:
    """Raise ConfigError where a description is not as ``sealed`` wrote it."""
    about = {name: value for name, value in held.items() if name != "seal"}
    if held.get("seal") != sha256(json.dumps(about).encode()):
        raise ConfigError(f"{str(file)!r} is damaged: it does not match its own SHA-256")


def _files(folder: Path) -> list[str]:
    """The names of the files below ``folder`` but ``model.json``."""
    found = (str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in found if name != "model.json" and not name.endswith(".tmp"))


def _digest(file: Path) -> str:
    stat = file.stat()
    return _digest_as(file, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _digest_as(file: Path, size: int, time: int) -> str:
    """SHA-256 of a file as it is since ``time``."""
    with file.open("rb") as held:
        return hashlib.file_digest(held, "sha256").hexdigest()


def _require_files(stated: Any, folder: Path) -> None:
    """Raise ConfigError unless the files of a saved pipeline are those of which SHA-256 is ``stated``."""
    if not isinstance(stated, dict):
        raise ConfigError(
            f"{str(folder)!r}: model.json states no SHA-256 of its files, expected a model as it was saved"
        )
    for name, digest in stated.items():
        if not (folder / name).is_file() or _digest(folder / name) != digest:
            raise ConfigError(f"{str(folder / name)!r} is damaged or missing: expected the SHA-256 in model.json")


def find(path: Path) -> Path:
    """The model folder that ``path`` names: itself, or the ``model`` folder of a run.

    Raises:
        ConfigError: neither holds a ``model.json``.
    """
    for candidate in (path, path / "model"):
        if (candidate / "model.json").is_file():
            return candidate
    raise ConfigError(f"{str(path)!r} is no model: expected a folder with model.json, or a finished run's folder")


def load_card(path: Path) -> Card:
    """The card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, one of another format, or a file that cannot be understood.
    """
    held, file = _read_about(path)
    try:
        card = Card.from_json(held)
        if not card.pipeline:
            return card
        _require_files(held.get("files"), file.parent)
        return replace(card, pipeline=pipelines.placed(card.pipeline, file.parent))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{str(file)!r} is no model's description: {type(error).__name__}: {error}") from error


def _read_about(path: Path) -> tuple[dict, Path]:
    """The content and the path of ``model.json``."""
    file = find(path) / "model.json"
    try:
        held = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(held, dict) or held.get("format") not in (FORMAT, UNSEALED):
        raise ConfigError(f"{str(file)!r} is of another format: expected {FORMAT!r}")
    if held["format"] == FORMAT:
        require_seal(held, file)
    return held, file


def load(path: Path) -> tuple[Denoiser, Card]:
    """The denoiser and card of the model that ``path`` names.

    Raises:
        ConfigError: no model there, weights that are not the saved ones, or weights of another architecture.
    """
    card, folder, about = load_card(path), find(path), _read_about(path)[0]
    if card.pipeline:
        return build(card), card
    try:
        denoiser = build(card)
    except (AttributeError, KeyError, TypeError, RuntimeError) as error:
        raise ConfigError(f"{str(folder / 'model.json')!r} describes no model: {error}") from error
    modules = {"weights": (denoiser, about.get("sha256"))}
    if card.autoencoder:
        modules["space"] = (denoiser.space.module, about.get("space_sha256"))
    for name, (module, stated) in modules.items():
        load_into(module, folder / f"{name}.safetensors", stated)
    return denoiser, card


def load_into(module: nn.Module, file: Path, stated: Any) -> None:
    """Load the weights in ``file``.

    Raises:
        ConfigError: no file, weights of another architecture, or not of the stated SHA-256; or none is stated.
    """
    if not isinstance(stated, str):
        raise ConfigError(
            f"weights {str(file)!r}: their description states no SHA-256, expected a model as it was saved"
        )
    try:
        blob = read_file(file)
        if sha256(blob) != stated:
            raise ConfigError(f"weights {str(file)!r} are damaged: they do not match the SHA-256 in {file.parent.name}")
        module.load_state_dict(unpack(blob))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ConfigError(f"weights {str(file)!r} cannot be loaded: {error}") from error
