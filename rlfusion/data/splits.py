"""Which parts of the data are for training, and which are kept out: from the names that people give them."""

from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from rlfusion.common.errors import ConfigError, unknown

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "eval")
TEST = ("test", "testing")
NONE = "none"


class Parts(NamedTuple):
    """The name of the training part, and of the held-out part ("" for none of its own)."""

    train: str
    held: str


def is_split(name: str) -> bool:
    """Whether a name, in any case, is one that people give to a part of their data: train, val, test and the like."""
    return name.lower() in (*TRAIN, *VALIDATION, *TEST)


def choose(found: Counter[str], split: str, held: str, where: str) -> Parts | None:
    """The parts among ``found`` (their sizes by name); None where the names are no splits.

    By themselves ``train`` (or ``training``) is trained on, and ``val`` (``valid``, ``validation``, ``dev``, ``eval``)
    or, where there is none, ``test`` (``testing``) is held out. ``split`` and ``held`` name others; "none" as ``split``
    says that these names are no splits.

    Raises:
        ConfigError: no such part, or names of which some look like splits and do not settle it.
    """
    if split == NONE:
        if held:
            raise ConfigError(f"split = 'none', held = {held!r}: expected held only beside a split")
        return None
    if split:
        for name in filter(None, (split, held)):
            if name not in found:
                raise unknown(f"split of {where}", name, found)
        if split == held:
            raise ConfigError(f"split, held = {split!r}: expected two parts")
        return Parts(split, held)
    train, validation, test = (_among(found, names) for names in (TRAIN, VALIDATION, TEST))
    if held:
        if held not in found:
            raise unknown(f"split of {where}", held, found)
        if len(train) != 1 or train == [held]:
            raise ConfigError(f"held = {held!r} of {where}: expected split='...' beside it, one of {_list(found)}")
        return Parts(train[0], held)
    others = [name for name in found if not is_split(name)]
    held_out = validation or test
    if not train + held_out or (others and not (train and held_out)):
        return None
    if others or len(train) != 1 or len(held_out) > 1:
        raise ConfigError(
            f"{where} has {_list(found)}, of which some look like splits: expected one training part and one held-out "
            "part, or split='NAME' for the one to train on, or split='none' where they are classes"
        )
    return Parts(train[0], held_out[0] if held_out else "")


def require_no_hidden(parents: dict[str, set[str]], where: str) -> None:
    """``parents``: the names of the folders below each folder.

    Raises:
        ConfigError: a training and a held-out part lie where they would be taken for one class.
    """
    for parent, names in sorted(parents.items()):
        if _among(names, TRAIN) and _among(names, VALIDATION + TEST):
            raise ConfigError(
                f"{where} has {_list(sorted(names))} below {parent!r}, which look like splits inside of a class: "
                f"expected them at the top (the data folder may be {parent!r}), or split='none'"
            )


def _among(found: Collection[str], names: tuple[str, ...]) -> list[str]:
    return sorted(name for name in found if name.lower() in names)


def _list(names: Collection[str]) -> str:
    shown = [repr(name) if name else "images outside of them" for name in list(names)[:6]]
    return ", ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
