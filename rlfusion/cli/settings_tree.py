"""The settings of every command as a tree."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Tree:
    """The leaves of a settings class, by dotted name, with their annotations; and the names of its groups."""

    leaves: Mapping[str, Any]
    groups: frozenset[str]

    def names(self) -> list[str]:
        """All of them."""
        return [*self.leaves, *self.groups]

    def holder(self, key: str) -> str:
        """The leaf that is a mapping, and of which ``key`` is a part; "" for none."""
        parts = key.split(".")
        above = (".".join(parts[:n]) for n in range(1, len(parts)))
        return next((name for name in above if name in self.leaves and "dict" in str(self.leaves[name])), "")


@cache
def tree(settings: type, extra: tuple[str, ...] = ()) -> Tree:
    """The tree of a settings class; ``extra`` are further options of text."""
    leaves: dict[str, Any] = dict.fromkeys(extra, str)
    groups: set[str] = set()

    def walk(part: type, prefix: str) -> None:
        hints = get_type_hints(part)
        for field in fields(part):
            name, hint = prefix + field.name, hints[field.name]
            if isinstance(hint, type) and is_dataclass(hint):
                groups.add(name)
                walk(hint, f"{name}.")
            else:
                leaves[name] = hint

    walk(settings, "")
    return Tree(leaves, frozenset(groups))


@cache
def command_trees() -> dict[str, Tree]:
    """The tree of every command."""
    from rlfusion import config
    from rlfusion.config import Autoencode, CheckModel, CheckReward, Compare, Serve, TrainClip

    classes = {
        "finetune": config.with_agent("ddpo"),
        "compare": Compare,
        "pretrain": config.Pretrain,
        "distill": config.with_method("cd"),
        "pretrain-autoencoder": Autoencode,
        "train-clip": TrainClip,
        "sample": config.Sample,
        "evaluate": config.Evaluate,
        "check-agent": config.CheckAgent,
        "reproduce": config.Reproduce,
        "check-model": CheckModel,
        "check-reward": CheckReward,
        "serve-reward": Serve,
        "board": config.Board,
    }
    return {name: tree(settings) for name, settings in classes.items()}
