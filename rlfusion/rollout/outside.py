"""What a learner may open by name beside its rollouts: a teacher, another model that walks the same chain."""

from typing import Protocol

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.policy import Policy


class Outside(Protocol):
    """Opens what the settings of an agent name."""

    def teacher(self, model: str, guidance: float | None) -> Policy:
        """The frozen policy of ``model``, "" for the one that the learner begins with, over the learner's own chain,
        prompts and latents, under a guidance weight of its own; None for the chain's.

        Raises:
            ConfigError: there is no such model, or it cannot teach this one.
        """


class Nothing:
    """Of a task whose maker opens nothing."""

    def teacher(self, model: str, guidance: float | None) -> Policy:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"teacher = {model!r}: this task opens no models, expected an agent without a teacher")
