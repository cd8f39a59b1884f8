"""The rewards whose weights were learned, and the options that would leave them without.

A worker builds such a reward blank, and is sent its weights; what a user asks for must have them.
"""

from collections.abc import Mapping
from typing import Any

from rlfusion.common.errors import ConfigError, shorten

_CLIP = ("model", "a run of train-clip (or runs/cache/clip-...), or a model of open_clip")
FROM_DATA: dict[str, tuple[str, str]] = {
    "class_logprob": ("weights", "the file of a classifier (runs/cache/classifier-...)"),
    "clip_score": _CLIP,
    "clip_class": _CLIP,
    "clip_similarity": _CLIP,
}
"""Rewards that a run trains on its data where one option, given here with its meaning, does not name their weights."""

_PUBLISHED = ("aesthetic", "hps_v2", "pick_score")
"""Rewards whose weights were published; no run trains them."""
_CLIPS = {*_PUBLISHED, *(name for name, row in FROM_DATA.items() if row is _CLIP)}


def require_weights(options: Mapping[str, Mapping[str, Any] | None]) -> None:
    """Refuse, of the options that a user gives by a reward's name, those that leave it with random weights: they are
    for a worker, to which the weights are sent.

    Raises:
        ConfigError: says which option and what was expected.
    """
    for name, held in options.items():
        given = held or {}
        if name in _PUBLISHED and "model" in given and not given["model"]:
            _refuse_blank(name, "model", given, "a model of open_clip, or none of this option for the published one")
        if name in _CLIPS and given.get("architecture") is not None:
            _refuse_blank(name, "architecture", given, "the option model, which has weights")
        if name == "aesthetic" and not isinstance(given.get("head", ""), str):
            _refuse_blank(name, "head", given, "the file of its weights")


def _refuse_blank(name: str, option: str, given: Mapping[str, Any], expected: str) -> None:
    raise ConfigError(
        f"option {option} = {shorten(repr(given[option]))} of reward {name!r} leaves it without trained weights: "
        f"expected {expected}"
    )
