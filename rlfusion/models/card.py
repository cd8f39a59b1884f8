"""The card of a model: what its folder says of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rlfusion.common.code_files import absolute, files_of
from rlfusion.diffusion.denoiser import Answers

KINDS: Mapping[str, type | tuple[type, ...]] = {
    **{"config": dict, "shape": list, "names": list, "chain": dict, "captioned": bool, "autoencoder": dict},
    **{"boundary": str, "weights": list, "answers": str, "pipeline": dict, "data": dict},
}
"""What the entries of a card are as JSON."""
PER_PROMPT = ("negatives", "metadata")
"""What a pipeline's card keeps of each prompt, beside its text."""


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

    def __post_init__(self) -> None:
        for name in ("net", "schedule", "kind"):
            object.__setattr__(self, name, absolute(getattr(self, name)))


@dataclass(frozen=True)
class Card:
    """The description of a saved model: the architecture, the shape (C, H, W) of a sample, the classes' names, the
    settings of the chain that it was made with (``chain.Chain``; empty for none in particular), whether the names are
    captions, which the network reads, and the autoencoder in whose latents it works (``autoencoder.build``; empty for
    pixels). Of a distilled model also the boundary of a consistency function around it (``LCM(...)``; empty for none)
    and the range (low, high) of guidance weights that the network reads (empty for none). ``answers`` says what x0_hat
    is, the mean or the end of a walk. ``pipeline`` says which pretrained pipeline it is, if it is one
    (``pipelines.model``); its names are prompts. ``data`` says what it was pretrained on here, as ``data``, ``size``
    and ``held_out`` of the settings, and the SHA-256 of that (``Dataset.sha256``); empty where that is not known.
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
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def metadata(self) -> tuple[Mapping[str, Any], ...]:
        """The metadata of each prompt of a pipeline; () for none."""
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
        """A JSON-able dict that ``from_json`` reads back; it shares its values with the card. ``sources``
        holds the files of the user's own code that it names, and their SHA-256.
        """
        held = {**vars(self), "config": asdict(self.config)}
        sources = files_of([held["config"], self.chain, self.boundary, self.pipeline.get("family", "")])
        return held | ({"sources": sources} if sources else {})

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
        known = ("chain", "captioned", "autoencoder", "boundary", "answers", "pipeline", "data")
        own = {name: card[name] for name in known if name in card}
        own["weights"] = tuple(card.get("weights", ()))
        return cls(Config(**card["config"]), tuple(card["shape"]), tuple(card["names"]), **own)
