"""Settings as YAML, of a file or of a value on the command line, read so that nothing becomes something else.

YAML 1.1 has traps: ``010`` is 8, ``1:30`` is 90, ``1e-4`` is a text, of a key that comes twice the first is lost, and a
few lines of anchors can stand for gigabytes. Here the first two are texts, the third is a number, and the others are
refused.
"""

import os
import re
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import yaml

from rlfusion.common.errors import LONGEST_PATH, ConfigError, shorten

MOST_BYTES = 2**20
MOST_DEEP = 100
MOST_VALUES = 20_000
"""Values that a text may stand for, aliases counted as often as they are used."""


OTHERWISE = ("int", "float", "timestamp")
"""The kinds of value that YAML 1.1 finds in texts, and which are read otherwise here, or not at all."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] not in OTHERWISE]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9](?:_?[0-9])*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:(?:[0-9](?:_?[0-9])*\.(?:[0-9](?:_?[0-9])*)?|\.[0-9](?:_?[0-9])*)(?:[eE][-+]?[0-9]+)?"
        r"|[0-9](?:_?[0-9])*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load(text: str, what: str) -> Any:
    """What ``text`` says; ``what`` names it in errors.

    Raises:
        ConfigError: it is no YAML, has a key twice, stands for too much, or holds what is no plain value.
    """
    if _depth(text) > MOST_DEEP:  # PyYAML would take quadratic time to find out
        raise ConfigError(f"{what}: brackets too deep in each other, expected at most {MOST_DEEP}")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _require_small(node, what)
        _require_distinct(node, what)
        return loader.construct_document(node)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is no YAML: {_problem(error)}") from error
    except (RecursionError, MemoryError) as error:
        raise ConfigError(f"{what}: lists and mappings too deep in each other, expected a few levels") from error
    except (ValueError, OverflowError, TypeError) as error:  # a value that its tag does not allow
        raise ConfigError(f"{what}: {shorten(error, 120)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def load_file(path: str, option: str = "config") -> dict[str, Any]:
    """The mapping of settings that a file holds; ``option`` names it in errors.

    Raises:
        ConfigError: no such file, or none that holds a mapping in YAML and UTF-8.
    """
    what, file = f"--{option} {shorten(repr(path), LONGEST_PATH)}", Path(path)
    try:
        if not file.exists():
            raise ConfigError(
                f"{what}: there is no such file (from {shorten(os.getcwd(), LONGEST_PATH)}); expected a YAML file, or "
                "settings in braces, {seed: 1}"
            )
        if not file.is_file():
            inside = file / "config.yaml"
            advice = f"; did you mean {str(inside)!r}?" if inside.is_file() else ""
            raise ConfigError(f"{what}: this is no file, expected a YAML file{advice}")
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{what}: {file.stat().st_size} bytes, expected a YAML file of at most {MOST_BYTES}")
        text = file.read_bytes().decode("utf-8-sig")
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not UTF-8 (byte {error.start}): expected a YAML file in UTF-8") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise ConfigError(f"{what} cannot be read: {shorten(getattr(error, 'strerror', error), 120)}") from error
    held = load(text, what)
    if held is None:
        raise ConfigError(f"{what} is empty: expected settings, such as seed: 1")
    if not isinstance(held, dict):
        raise ConfigError(f"{what} holds {shorten(repr(held))}: expected a mapping of settings, such as seed: 1")
    return held


def _depth(text: str) -> int:
    """The largest number of brackets that are open at once."""
    return max(accumulate((c in "[{") - (c in "]}") for c in text if c in "[]{}"), default=0)


def _require_small(root: yaml.Node, what: str) -> None:
    """Refuse what would stand for too many values, aliases spelled out, or for itself."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = MOST_VALUES + 1  # what holds itself is without end
            children = [one for pair in node.value for one in (pair if isinstance(pair, tuple) else (pair,))]
            sizes[id(node)] = 1 + sum(map(size, children))
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise ConfigError(f"{what} stands for more than {MOST_VALUES} values, its aliases spelled out: expected fewer")


def _require_distinct(root: yaml.Node, what: str) -> None:
    """Refuse a mapping with a key twice, and keys that are no names."""
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if isinstance(node, yaml.ScalarNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            stack += node.value
            continue
        keys = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{what}, line {line}: a key is a list or a mapping, expected a name")
            if key.value in keys:
                raise ConfigError(f"{what}, line {line}: {shorten(repr(key.value))} is there twice, expected once")
            keys.add(key.value)
            stack.append(value)


def _problem(error: yaml.YAMLError) -> str:
    """A YAML error in a line: where, and what."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {shorten(error.problem, 120)}"
    return shorten(error, 120)
