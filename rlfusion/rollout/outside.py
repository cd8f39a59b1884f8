"""What a learner may open by name beside its rollouts: a teacher, another model that walks the same chain; and samples
that are stored.
"""

from typing import NamedTuple, Protocol

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.policy import Policy


class Stored(NamedTuple):
    """N samples in the space of the model: latents x (N, *) and the numbers of their prompts ``prompt`` (N,) int64, on
    the CPU; a ``score`` (N,) float64 of each, None where none is known. Of ``pairs`` 2 i and 2 i + 1 are compared with
    each other, else all samples of a prompt are.
    """

    x: Tensor
    prompt: Tensor
    score: Tensor | None = None
    pairs: bool = False


class Outside(Protocol):
    """Opens what the settings of an agent name."""

    def teacher(self, model: str, guidance: float | None) -> Policy:
        """The frozen policy of ``model``, "" for the one that the learner begins with, over the learner's own chain,
        prompts and latents, under a guidance weight of its own; None for the chain's.

        Raises:
            ConfigError: there is no such model, or it cannot teach this one.
        """

    def stored(self, data: str) -> Stored:
        """The images of ``data``.

        Raises:
            ConfigError: there are none, or of a shape or a prompt that the model does not have.
        """


class Nothing:
    """Of a task whose maker opens nothing."""

    def teacher(self, model: str, guidance: float | None) -> Policy:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"teacher = {model!r}: this task opens no models, expected an agent without a teacher")

    def stored(self, data: str) -> Stored:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"data = {data!r}: this task opens no data, expected an agent that learns from rollouts")
