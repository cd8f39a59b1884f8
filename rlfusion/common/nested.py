"""Nested state as plain data: a JSON record of its structure and scalars beside its named tensors.

Dicts (str or int keys, in order), lists, tuples, tensors, str, int, float, bool and None come back exactly as they
were: in the record a container is a list or {"tag": ...}, so nothing in the state can be taken for another thing.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

ODD_FLOATS = ("nan", "inf", "-inf")


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
    """The value whose record and tensors ``flatten`` gave.

    Raises:
        ValueError, TypeError, KeyError: there is none.
    """
    if isinstance(record, list):
        return [restore(item, tensors) for item in record]
    if not isinstance(record, dict):
        return record
    ((tag, held),) = record.items()
    if tag == "tensor":
        return tensors[held]
    if tag == "float":
        return _odd_float(held)
    if tag in ("tuple", "dict") and not isinstance(held, list):
        raise TypeError(f"{tag} of a {type(held).__name__}: expected a list")
    if tag == "tuple":
        return tuple(restore(item, tensors) for item in held)
    if tag != "dict":
        raise ValueError(f"{tag!r}: expected tensor, float, tuple or dict")
    items = {_key(key): restore(item, tensors) for key, item in held}
    if len(items) != len(held):
        raise ValueError(f"a key comes twice among {list(items)[:10]}")
    return items


def _odd_float(text: Any) -> float:
    if text not in ODD_FLOATS:
        raise ValueError(f"float {text!r}: expected one of {', '.join(ODD_FLOATS)}")
    return float(text)


def _key(key: Any) -> str | int:
    if type(key) not in (str, int):
        raise TypeError(f"a key of type {type(key).__name__}: expected str or int")
    return key
