"""What is served elsewhere: a reward for each model that asks, and within what limits."""

import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from torch import nn

from rlfusion.common.errors import ConfigError, require_positive
from rlfusion.common.weights import pack
from rlfusion.common.weights import sha256 as digest
from rlfusion.rewards.base import Reward
from rlfusion.rewards.grouped import needs_groups
from rlfusion.rewards.remote.client import Served
from rlfusion.rewards.remote.tables import MOST_TABLES
from rlfusion.rewards.untrained import FROM_DATA, require_weights

MODELS = 4
"""How many models' task info a server keeps a reward for."""


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        max_bytes: of a question.
        deadline_s: to receive a question, and to score it.
        max_held: bytes of all questions that are held at once, received or being received; and, beside, of the tables
            of prompts that are remembered.

    Raises:
        ConfigError: no room for one question.
    """

    max_bytes: int = 256 * 2**20
    deadline_s: float = 120.0
    max_held: int = 2**30

    def __post_init__(self) -> None:
        require_positive(self, "max_bytes", "deadline_s")
        if self.max_held < self.max_bytes:
            raise ConfigError(f"max_held = {self.max_held}: expected {self.max_bytes} at least, one question")


def require_servable(name: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for a reward whose weights a run would train for it, but a server, without data, cannot; and
    for options that leave it without any.
    """
    require_weights({name: options})
    key, expected = FROM_DATA.get(name, ("", ""))
    if key and not options.get(key):
        raise ConfigError(f"options.{key} = None: expected {expected}")


class Offer:
    """A reward for each model that asks: ``make(task_info)``, kept for the last few. It is given the entries that it
    ``wants``, by name.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], wants: Collection[str], make: Callable[[dict[str, Any]], Reward]
    ) -> None:
        self.name, self.wants, self._make = name, wants, make
        self._described = json.dumps([name, dict(options)], sort_keys=True, default=str)
        self._kept: OrderedDict[str, tuple[Reward, str]] = OrderedDict()
        self._keys: OrderedDict[str, str] = OrderedDict()

    def reward(self, task_info: Mapping[str, Any], table: str = "") -> tuple[Reward, str]:
        """The reward for a model of this task info, and its identity: a digest of its name, options and weights.
        ``table`` is the digest of the greeting that said it, if that is known.

        Raises:
            ConfigError: there is none.
        """
        told = {key: value for key, value in task_info.items() if key in self.wants}
        task_info = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
        key = self._key(task_info, table)
        if key not in self._kept:
            reward = self._make(task_info)
            state = digest(pack(reward.state_dict())) if isinstance(reward, nn.Module) else ""
            self._kept[key] = reward, sha256(f"{self._described}{state}".encode()).hexdigest()[:16]
            while len(self._kept) > MODELS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _key(self, task_info: Mapping[str, Any], table: str) -> str:
        """Of what a reward is made of; not made again for each question, as there may be a million prompts."""
        if not table or table not in self._keys:
            key = sha256(json.dumps(task_info, sort_keys=True).encode()).hexdigest()
            if not table:
                return key
            self._keys[table] = key
            while len(self._keys) > MOST_TABLES:
                self._keys.popitem(last=False)
        return self._keys[table]

    def served(self, task_info: Mapping[str, Any], limits: Limits, table: str = "") -> Served:
        """What is told of it."""
        reward, identity = self.reward(task_info, table)
        return Served(self.name, identity, needs_groups(reward), limits.max_bytes)
