"""Which settings decide the bits of a run: all, by dotted name, and the SHA-256 of those that do."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any

from rlfusion.common.code_files import files_of
from rlfusion.common.weights import sha256

FREE = re.compile(
    r"(root|name|device|threads|updates|budget_queries|workers|side_by_side|run_restarts|"
    r"rollout\.(workers|overlap)|ray(\..*)?|"
    r"learner\.(ranks|shard|cpus_per_rank|gpus_per_rank|resources_per_rank(\..*)?|restarts|timeout_s)|"
    r"(pretrain\.)?checkpoint_every|checkpoints\..*|track|track_failures)"
)
"""Settings that decide no bits of the updates that are done: where the run is, who computes, how often it saves, how
far it goes, who follows it. ``device`` and ``threads`` decide last bits only, as all of the numerics fingerprint: it is
told."""

FURTHER = ("updates", "budget_queries")
"""Of these, how far a run goes."""

CACHED = re.compile(r".*cache/(base-[0-9a-f]{16})/model")
"""A model of the cache: its name says what it is, and where the cache lies says nothing."""

FILES = "files."
ABSENT = "absent"


def flat(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass, or their mapping, by dotted name, as JSON has them; and for each file that they name
    as the place of a thing (``path/to/file.py:name``) its SHA-256, as ``files.`` and its path.
    """
    held = plain(settings)
    return dict(_leaves(held, "")) | {f"{FILES}{path}": digest for path, digest in files_of(held).items()}


def usual(settings: Any) -> dict[str, Any]:
    """The default of each setting of a dataclass that has one, by dotted name, as of ``flat``. A group that is of
    another class than the default one, such as another agent, has the defaults of its own.
    """
    return {} if isinstance(settings, Mapping) else dict(_leaves(plain(_defaults(settings, None)), ""))


def _defaults(settings: Any, default: Any) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for field in fields(settings):
        if type(default) is type(settings):
            value = getattr(default, field.name)
        else:
            value = field.default if field.default_factory is MISSING else field.default_factory()
        if is_dataclass(getattr(settings, field.name)):
            held[field.name] = _defaults(getattr(settings, field.name), value)
        elif value is not MISSING:
            held[field.name] = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    return held


def added(old: Mapping[str, Any], settings: Any) -> dict[str, Any]:
    """The settings of a dataclass that the flat ``old`` ones do not have, as they were made before there were any, and
    that have their defaults: with or without them it is the same run.
    """
    default = usual(settings)
    new = {name: value for name, value in flat(settings).items() if name not in old and name in default}
    return {name: value for name, value in new.items() if json.dumps(value) == json.dumps(default[name])}


def plain(settings: Any) -> dict[str, Any]:
    """The settings of a dataclass, or their mapping, as a file of settings holds them: group by group, as of JSON."""
    return json.loads(json.dumps(settings if isinstance(settings, Mapping) else asdict(settings)))


def typed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of flat settings that can be typed: all but the digests of files."""
    return {name: value for name, value in settings.items() if not name.startswith(FILES)}


def _leaves(held: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in held.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of flat settings that decide bits. With rollouts ahead of the learner (rollout.lag) checkpoints do, too."""
    kept = {name: value for name, value in settings.items() if not FREE.fullmatch(name)}
    if settings.get("rollout.lag") and "checkpoint_every" in settings:
        kept["checkpoint_every"] = settings["checkpoint_every"]
    for name in ("base", "teacher"):
        if isinstance(kept.get(name), str) and (cached := CACHED.fullmatch(kept[name])):
            kept[name] = cached[1]
    return kept


def digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of what decides bits."""
    return sha256_of(decisive(settings))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (old value, new value)} of flat settings that differ."""
    names = [*new, *(name for name in old if name not in new)]
    pairs = {name: (old.get(name, ABSENT), new.get(name, ABSENT)) for name in names}
    return {name: pair for name, pair in pairs.items() if json.dumps(pair[0]) != json.dumps(pair[1])}


def sha256_of(value: Any) -> str:
    """SHA-256 of a value as canonical JSON."""
    return sha256(json.dumps(value, sort_keys=True).encode())
