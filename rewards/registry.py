"""From a name and its options to a reward.

A name is, in this order, a row of ``REWARDS``, the address of a server, ``http://host:port`` (``remote``),
``path/to/file.py:name``, ``package.module:name``, or an entry point of the group ``rlfusion.rewards``. What it names is
one of

    a reward    a module or object that is called, or a function with a parameter for images; ``adapters`` binds its
                parameters by their names, and options set the others
    a factory   a class, or a function without such a parameter; it is called with the options by keyword, and what it
                makes is the reward, or has a method ``score``

Either may ask what the model makes: a setting named ``prompts``, ``shape``, ``classes`` or ``metadata`` that the
options leave open is filled in from ``task_info``; ``prompts`` and ``metadata`` have one entry a condition. The
condition of a sample is a number, the index of its prompt.
"""

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from torch import nn

from rlfusion.common import spec
from rlfusion.common.code_files import absolute
from rlfusion.common.errors import ConfigError, unknown
from rlfusion.common.registry import Registry
from rlfusion.common.user_code import running
from rlfusion.rewards.adapters import adapted, fixed, signature_of, whole
from rlfusion.rewards.base import Reward
from rlfusion.rewards.binding import NAMES, ONE, Adapter, remedy
from rlfusion.rewards.remote.client import Remote, is_url
from rlfusion.rewards.weighted import WeightedSum
from rlfusion.rewards.wrapped import CallOptions

_MODULES = {
    "ink": "ink:ink",
    "symmetry": "symmetry:symmetry",
    "jpeg_compressibility": "jpeg:JpegCompressibility",
    "jpeg_incompressibility": "jpeg:JpegIncompressibility",
    "class_logprob": "class_logprob:ClassLogProb",
    "clip_score": "clip_score:ClipScore",
    "clip_class": "clip_class:ClipClass",
    "clip_similarity": "clip_similarity:ClipSimilarity",
    "aesthetic": "aesthetic:Aesthetic",
    "hps_v2": "hps_v2:HPSv2",
    "pick_score": "pick_score:PickScore",
    "brightness": "image_statistics:Brightness",
    "edge_density": "image_statistics:EdgeDensity",
    "entropy": "image_statistics:Entropy",
    "ocr_accuracy": "ocr_accuracy:OcrAccuracy",
    "vlm_judge": "vlm_judge:VlmJudge",
}
REWARDS = Registry(
    "reward",
    "rlfusion.rewards",
    {name: f"rlfusion.rewards.{place}" for name, place in _MODULES.items()},
    also="http://host:port",
)

Options = Mapping[str, Mapping[str, Any]]
NO_CALL_OPTIONS = CallOptions()


def task_info(
    prompts: Sequence[str], shape: Sequence[int], metadata: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """What a reward may ask about the task: the text of each condition, the shape (C, H, W) of a sample, the number of
    conditions, and the metadata of each (an empty mapping where there are none).
    """
    told = tuple(metadata) or ({},) * len(prompts)
    return {"prompts": tuple(prompts), "shape": tuple(shape), "classes": len(prompts), "metadata": told}


def build(
    reward: str | Mapping[str, float],
    options: Options | None = None,
    task_info: Mapping[str, Any] | None = None,
    call_options: CallOptions = NO_CALL_OPTIONS,
    made: Mapping[str, Reward] | None = None,
) -> Reward:
    """One reward by name, or the ``WeightedSum`` of several by ``{name: weight}``.

    Args:
        options: the settings of each reward by its name, ``{"jpeg_compressibility": {"quality": 80}}``.
        task_info: what the function ``task_info`` gives; it fills in the settings that ``options`` leave open.
        call_options: how each reward is called.
        made: rewards that exist already, by name.

    Raises:
        ConfigError: an unknown name or option (with the nearest one), a missing or unusable option, options for a
            reward that is not in use, or a thing that is no reward.
    """
    names, options = names_of(reward), options or {}
    require_named(options, names)
    built = dict(made or {})
    for name in names:
        given = options.get(name) or {}
        one = built[name] if name in built else _build(name, given, task_info or {})
        built[name] = call_options.around(one, name, json.dumps([name, given], sort_keys=True, default=str))
    built = {name: built[name] for name in names}
    return built[reward] if isinstance(reward, str) else WeightedSum(built, reward)


def asks(name: str) -> set[str]:
    """The entries of ``task_info`` that the reward of that name asks for; all, where they cannot be known before."""
    found = find(name)
    wanted = {"prompts", "shape", "classes", "metadata"} & (set(signature_of(name, found).parameters) - fixed(found))
    if name in REWARDS or is_url(name):
        return wanted
    if inspect.isclass(whole(found)):
        own = vars(whole(found))
        methods = [held for held in ("forward", "__call__", "score") if callable(own.get(held))]
        names = {p for method in methods for p in inspect.signature(own[method]).parameters}
    elif isinstance(found, nn.Module) or _takes_images(name, found, Adapter()):
        names = set(signature_of(name, found).parameters)
    else:
        names = {"prompts", "metadata"}
    roles = {NAMES.get(p.lower(), "") for p in names}
    return wanted | {ONE.get(role, role) for role in roles & {"prompts", "prompt", "metadata"}}


def require_named(options: Options, names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: options of a reward that is not in use.
    """
    for name in options:
        if name not in names:
            raise unknown("reward in the options", name, names)


def names_of(reward: str | Mapping[str, float]) -> list[str]:
    """The names in a setting."""
    return [reward] if isinstance(reward, str) else list(reward)


def find(name: str) -> Callable[..., Any]:
    """The reward or factory that ``name`` stands for.

    Raises:
        ConfigError: nothing has that name, or what has it cannot be called.
    """
    if is_url(name):
        return functools.partial(Remote, name)
    held = REWARDS.find(name)
    if held.ours and held.name != name:  # options and logs go by the name as it is written
        raise unknown("reward", name, REWARDS.names())
    found = held.object
    if not callable(found) and not callable(getattr(found, "score", None)):
        raise ConfigError(f"reward {name!r} is {type(found).__name__}: expected a function, a class or a callable")
    return found


def everywhere(name: str) -> str:
    """The name by which a process with another working directory, too, finds the reward."""
    return absolute(name)


def labels(names: Sequence[str]) -> dict[str, str]:
    """A short name of each, for logs and folders: the last part where that tells them apart, else the whole."""
    short = {name: _label(name) for name in names}
    alike = [label for label in short.values()]
    return {name: label if alike.count(label) == 1 else name for name, label in short.items()}


def _label(name: str) -> str:
    if is_url(name):
        first, *others = [urlsplit(url).netloc.replace(":", "-") for url in name.split(",")]
        return f"{first}+{len(others)}" if others else first
    return name.partition("(")[0].rpartition(":")[2]


def _build(name: str, options: Mapping[str, Any], task_info: Mapping[str, Any]) -> Reward:
    found = find(name)
    if name in REWARDS or is_url(name):
        return _of_ours(name, found, dict(options), task_info)
    return built(name, found, options, task_info)


def built(name: str, found: Any, options: Mapping[str, Any], task_info: Mapping[str, Any]) -> Reward:
    """The reward of what a user's name stands for, or of an object that errors call by that name: itself, or what it
    makes of the options.

    Raises:
        ConfigError: as ``build``.
    """
    options = dict(options)
    adapter = Adapter.read(name, options.pop("adapter", None))
    kind = whole(found)
    if inspect.isclass(kind) or (inspect.isfunction(kind) and not _takes_images(name, found, adapter)):
        return _reward(name, _made(name, found, options, task_info), {}, adapter, task_info)
    return _reward(name, found, options, adapter, task_info)


def _of_ours(name: str, found: Callable[..., Any], options: dict[str, Any], task_info: Mapping[str, Any]) -> Reward:
    """One of ``REWARDS``: a function of just (samples, cond), or what makes a reward."""
    if inspect.isfunction(found):
        _require_options(name, options, [])
        return found
    return _made(name, found, options, task_info)


def _made(name: str, found: Callable[..., Any], options: dict[str, Any], task_info: Mapping[str, Any]) -> Any:
    """The object that a class or another factory makes from its options."""
    settings = _settings(name, found, options, task_info)
    with running(f"reward {name!r} of {options}"):
        return found(**settings)


def _takes_images(name: str, found: Callable[..., Any], adapter: Adapter) -> bool:
    """Whether a function scores; else it makes what does."""
    parameters = signature_of(name, found).parameters
    if any(held.kind is held.VAR_POSITIONAL for held in parameters.values()):
        return True  # which is refused, in words, as nothing says what they are
    if adapter.told("order", ()):
        return bool(_ordered(parameters, adapter))
    given = {NAMES.get(parameter.lower(), "") for parameter in parameters if parameter not in fixed(found)}
    return bool({"images", "image"} & {*given, *adapter.parameters.values()})


def _settings(
    name: str,
    found: Callable[..., Any],
    options: dict[str, Any],
    task_info: Mapping[str, Any],
    kept: Sequence[str] = (),
) -> dict[str, Any]:
    """The options, and the ``task_info`` that they leave open, of those parameters that are not ``kept``."""
    parameters = [p for p in signature_of(name, found).parameters.values() if p.name not in kept]
    asked = [p.name for p in parameters if p.name in task_info and p.name not in fixed(found)]
    options = {asked_for: task_info[asked_for] for asked_for in asked} | options
    _require_options(name, options, parameters)
    return options


def _reward(name: str, found: Any, options: dict[str, Any], adapter: Adapter, task_info: Mapping[str, Any]) -> Reward:
    """The reward that an object or a function is, or that its method ``score`` is."""
    scorer, method = _scorer(name, found, adapter)
    parameters = signature_of(name, scorer).parameters
    words = {p: NAMES.get(p.lower(), "") for p in parameters if p not in options and p not in fixed(scorer)}
    if "cond" in words.values():  # beside the condition, prompts are a setting: the text of each condition
        words = {p: role for p, role in words.items() if role != "prompts" or parameters[p].kind <= 1}
    kept = [p for p, role in words.items() if role] + list(adapter.parameters) + _ordered(parameters, adapter)
    options = _settings(name, scorer, options, task_info, kept)
    reward = adapted(name, scorer, found, options, adapter, task_info, method)
    return reward or (functools.partial(found, **options) if options else found)


def _ordered(parameters: Mapping[str, inspect.Parameter], adapter: Adapter) -> list[str]:
    """The parameters that the adapter binds by their order."""
    return [p for p, held in parameters.items() if held.kind <= 1][: len(adapter.told("order", ()))]


def _scorer(name: str, found: Any, adapter: Adapter) -> tuple[Callable[..., Any], str]:
    """What is called of an object, and its name if it is a method: what is told, itself, or ``score``."""
    method = adapter.told("method")
    idle = isinstance(found, nn.Module) and inspect.getattr_static(type(found), "forward") is nn.Module.forward
    if inspect.isfunction(found) or (not method and callable(found) and not idle):
        return found, method
    method = method or "score"
    scorer = getattr(found, method, None)
    if not callable(scorer):
        raise ConfigError(
            f"reward {name!r} made {type(found).__name__}: expected a callable (samples, cond) -> (B,), or a method "
            f"{method}"
        )
    return scorer, method


def _require_options(name: str, options: Mapping[str, Any], settings: list[inspect.Parameter]) -> None:
    """Every option is a setting, every setting without a default is an option."""
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {p.name: p for p in settings if p.kind in by_keyword}
    for option in options:
        if option not in known and not any(p.kind is p.VAR_KEYWORD for p in settings):
            if not known:
                raise ConfigError(f"reward {name!r} takes no options: got {option!r}")
            raise unknown(f"option of reward {name!r}", option, known)
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        expected = f": expected {{{', '.join(f'{one}: ...' for one in missing)}}} among its options"
        if name not in REWARDS:
            expected = f", if it makes a reward{remedy(inspect.Signature(settings))}"
        raise ConfigError(f"reward {name!r} needs the options {missing}{expected}")
    spec.require_fit(known, options, f"reward {name!r}")
