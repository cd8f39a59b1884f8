"""Nested state as plain data: a JSON record of its structure and scalars beside its named tensors.

Dicts (str or int keys, in order), lists, tuples, tensors, str, int, float, bool and None come back exactly as they
were: in the record a container is a list or {"tag": ...}, so nothing in the state can be taken for another thing.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def flatten(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON record of ``value``; its tensors are added to ``tensors``, named by where they are below ``place``.

    Raises:
        TypeError: names the place of something that is none of the above.
    """
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if value is None or type(value) in (str, int, bool):
        return value
    if type(value) is float:  # the repr of a finite float reads back exactly
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, dict):
        if any(type(key) not in (str, int) for key in value):
            raise TypeError(f"{place} has keys {list(value)[:5]}: expected str or int")
        return {"dict": [[key, flatten(item, f"{place}/{key!r}", tensors)] for key, item in value.items()]}
    if type(value) in (list, tuple):
        items = [flatten(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(
        f"{place} is a {type(value).__name__}: expected a tensor, dict, list, tuple, str, int, float, bool or None"
    )


def restore(record: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value whose record and tensors ``flatten`` gave."""
    if isinstance(record, list):
        return [restore(item, tensors) for item in record]
    if not isinstance(record, dict):
        return record
    ((tag, held),) = record.items()
    if tag == "tensor":
        return tensors[held]
    if tag == "float":
        return float(held)
    if tag == "tuple":
        return tuple(restore(item, tensors) for item in held)
    return {key: restore(item, tensors) for key, item in held}
