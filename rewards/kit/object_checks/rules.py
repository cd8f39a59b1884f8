"""GenEval's rules (Ghosh et al. 2023): what must be in an image, and what must not, of the objects found in it.

    include   [{"class", "count", "color"?, "position"?: [relation, number of an earlier entry]}, ...]
    exclude   [{"class", "count"}, ...]: fewer of them than that

Of a class the ``count`` most certain objects are looked at. With d the distance of two centres, less ``NEAR`` times the
sum of the boxes' sizes along each axis, a is left of b where d_x / |distance| < -HALF, and so on.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rlfusion.common.errors import ConfigError, shorten, unknown

SURE, SURE_TO_COUNT = 0.3, 0.9
"""The least score of an object; of prompts whose tag is ``counting``."""
MOST = 16
NEAR, HALF = 0.1, 0.5
RELATIONS = ("left of", "right of", "above", "below")


class Found(NamedTuple):
    """An object: its box (x0, y0, x1, y1), how certain it is, and what a judge of colours is given of it."""

    box: tuple[float, float, float, float]
    score: float
    mask: Any = None


def kept(found: Sequence[Found], tag: str) -> list[Found]:
    """The objects of a class that count, the most certain first."""
    least = SURE_TO_COUNT if tag == "counting" else SURE
    return sorted((one for one in found if one.score > least), key=lambda one: -one.score)[:MOST]


def relations(a: Found, b: Found) -> set[str]:
    """Where a is, seen from b."""
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1)]
    sizes = [a.box[i + 2] - a.box[i] + b.box[i + 2] - b.box[i] for i in (0, 1)]
    left = [math.copysign(max(abs(o) - NEAR * s, 0.0), o) for o, s in zip(offset, sizes)]
    if all(abs(one) < 1e-3 for one in left):
        return set()
    dx, dy = (one / math.hypot(*offset) for one in left)
    said = {"left of": dx < -HALF, "right of": dx > HALF, "above": dy < -HALF, "below": dy > HALF}
    return {name for name, true in said.items() if true}


def met(
    row: Mapping[str, Any],
    objects: Mapping[str, Sequence[Found]],
    colors: Callable[[Sequence[Found], str], Sequence[str]],
) -> list[bool]:
    """Whether each entry of ``include``, then of ``exclude``, is met by the objects of each class; ``colors`` tells
    those of some of a class.
    """
    tag, groups, said = str(row.get("tag", "")), [], []
    for entry in row.get("include", ()):
        some = kept(objects.get(entry["class"], ()), tag)[: entry["count"]]
        fine = len(some) == entry["count"]
        if fine and "color" in entry:
            fine = list(colors(some, entry["class"])).count(entry["color"]) >= entry["count"]
        if fine and "position" in entry:
            relation, number = entry["position"]
            target = groups[number]
            fine = target is not None and all(relation in relations(a, b) for a in some for b in target)
        groups.append(some if fine else None)
        said.append(fine)
    for entry in row.get("exclude", ()):
        said.append(len(kept(objects.get(entry["class"], ()), tag)) < entry["count"])
    return said


def require_rules(row: Mapping[str, Any], classes: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: the metadata of a prompt are not GenEval's, or name what no detector here knows.
    """
    include, exclude = row.get("include"), row.get("exclude", [])
    if not isinstance(include, list) or not include or not isinstance(exclude, list):
        raise ConfigError(
            "object_checks: a prompt without GenEval's metadata (include: a list of {class, count}): expected the "
            "prompts of its evaluation_metadata.jsonl, or some like them"
        )
    for number, entry in enumerate([*include, *exclude]):
        fine = isinstance(entry, Mapping) and type(entry.get("count")) is int and entry["count"] > 0
        if not fine or not isinstance(entry.get("class"), str):
            raise ConfigError(f"object_checks: {shorten(repr(entry))}: expected {{class: a name, count: 1 at least}}")
        if entry["class"] not in classes:
            raise unknown("class of objects", entry["class"], classes)
        if "position" in entry:
            _require_position(entry["position"], number)


def _require_position(position: Any, number: int) -> None:
    fine = isinstance(position, list | tuple) and len(position) == 2 and type(position[1]) is int
    if not fine or position[0] not in RELATIONS or not 0 <= position[1] < number:
        raise ConfigError(
            f"object_checks: position {shorten(repr(position))}: expected [one of {', '.join(RELATIONS)}, the number "
            "of an entry before]"
        )
