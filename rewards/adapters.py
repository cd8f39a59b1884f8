"""Scorers of other libraries as rewards: what each of their parameters is given, by its name, and how answers are read.

    images, samples, imgs, pixels, x      the batch; image, img: one sample a call
    prompts, texts, captions              the words (B,); prompt, text, caption: those of one sample
    metadata                              what else is known of the prompt of each sample, a list of B mappings
    cond, condition, label(s), c          the condition (B,)

Images are a float tensor (B, C, H, W) in [0, 1], through which gradients pass; where the annotation says PIL's Image
or a numpy array, 8-bit ones, without gradient. A method ``score`` is called as ImageReward's: one prompt, PIL images.
A parameter that no name binds is an error; ``adapter``, an option of every reward, says what cannot be recognised.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError, unknown
from rlfusion.common.notices import say_once
from rlfusion.common.tensors import Cond, map_cond
from rlfusion.rewards.answers import one_score, scores
from rlfusion.rewards.base import require_labels

NAMES = {
    **dict.fromkeys(("images", "samples", "imgs", "pixels", "x"), "images"),
    **dict.fromkeys(("image", "img"), "image"),
    **dict.fromkeys(("prompts", "texts", "captions"), "prompts"),
    **dict.fromkeys(("prompt", "text", "caption"), "prompt"),
    **dict.fromkeys(("metadata", "metadatas"), "metadata"),
    **dict.fromkeys(("cond", "condition", "conditions", "label", "labels", "c"), "cond"),
}
"""What a parameter of a name is given."""

ONE = {"image": "images", "prompt": "prompts"}
"""The words for one sample, and those for a batch."""

LIKE = {
    "native": {"order": ("images", "cond")},
    "ddpo": {"order": ("images", "prompts", "metadata")},
    "image_reward": {"order": ("prompt", "image"), "method": "score", "images": "pil", "each": True},
    "hps": {"order": ("image", "prompt"), "method": "score", "images": "pil", "each": True},
    "pick_score": {"order": ("prompts", "images"), "images": "pil", "each": False},
}
"""Known signatures by name; "ddpo" is that of ddpo-pytorch, TRL, AlignProp and Flow-GRPO."""

FORMATS = ("tensor", "pil", "numpy", "uint8")
LISTED = re.compile(r"\b(list|tuple|sequence|iterable|ndarray|tensor)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Adapter:
    """The option ``adapter`` of a reward.

    Attributes:
        like: one of ``LIKE``: its parameters in order, whatever their names.
        parameters: what a parameter is given, by its name: images, image, prompts, prompt, metadata, cond.
        images: tensor (floats in [0, 1]), pil, numpy (uint8, (B, H, W, C)) or uint8 (a tensor).
        each: one sample a call; None as the names say.
        method: what is called of an object.
        scores: of a scorer that answers several named scores, the weight of each that counts.
    """

    like: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)
    images: str = ""
    each: bool | None = None
    method: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, name: str, option: Any) -> "Adapter":
        """From the option of the reward ``name``: a text for ``like``, or a mapping; None for none.

        Raises:
            ConfigError: it is none.
        """
        held = {"like": option} if isinstance(option, str) else dict(option or {})
        known = [one.name for one in fields(cls)]
        for key in held:
            if key not in known:
                raise unknown(f"entry of the adapter of reward {name!r}", str(key), known)
        made = cls(**held)
        checks = [("like", made.like, LIKE), ("images", made.images, FORMATS)]
        checks += [("parameters", role, set(NAMES.values())) for role in made.parameters.values()]
        for what, value, expected in checks:
            if value and value not in expected:
                raise unknown(f"{what} in the adapter of reward {name!r}", str(value), expected)
        return made

    def told(self, what: str, otherwise: Any = "") -> Any:
        """An entry, else that of ``like``."""
        own = getattr(self, what, None)
        return own if own not in ("", None) else LIKE.get(self.like, {}).get(what, otherwise)


class Bound(NamedTuple):
    """How a scorer is called: the role of each parameter, and which of them by keyword."""

    roles: dict[str, str]
    keywords: tuple[str, ...]
    images: str
    each: bool

    @property
    def native(self) -> bool:
        """Whether it is a reward as it stands: (samples, cond), and nothing else."""
        plain = list(self.roles.values()) == ["images", "cond"] and not self.keywords
        return plain and not self.each and self.images == "tensor"

    def __str__(self) -> str:
        kinds = {"tensor": "floats in [0, 1]", "pil": "PIL images", "numpy": "uint8 arrays", "uint8": "uint8 tensors"}
        bound = [f"{name} = {role}" if name != role else name for name, role in self.roles.items()]
        return (
            f"({', '.join(bound)}), images as {kinds[self.images]}, {'one sample a call' if self.each else 'a batch'}"
        )


def bind(name: str, signature: inspect.Signature, adapter: Adapter, method: str = "") -> Bound:
    """How a scorer of this signature is called, its options left out of it.

    Raises:
        ConfigError: a parameter that nothing binds, or what can be understood in two ways.
    """
    roles, keywords, listed, unbound = {}, [], set(), []
    order = list(adapter.told("order", ()))
    for parameter in signature.parameters.values():
        role = _role(name, parameter, adapter, order)
        if role:
            _require_no_default(name, parameter, role, adapter)
            if role in roles.values():
                raise ConfigError(f"reward {name!r}: two of its parameters are {role}{remedy(signature)}")
            roles[parameter.name] = role
            keywords += [parameter.name] if parameter.kind is parameter.KEYWORD_ONLY else []
            if role in ONE and LISTED.search(_annotated(parameter)):
                listed.add(role)
        elif parameter.kind is parameter.VAR_POSITIONAL or (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        ):
            unbound.append(parameter.name)
    given = {ONE.get(role, role) for role in roles.values()}
    if unbound or "images" not in given:
        message = f"cannot tell what {', '.join(map(repr, unbound))} is" if unbound else "no parameter takes images"
        raise ConfigError(f"reward {name!r}{signature}: {message}{remedy(signature)}")
    return Bound(roles, tuple(keywords), _format(name, signature, roles, adapter, method), _each(
        name, roles, listed, adapter, method
    ))  # fmt: skip


def _role(name: str, parameter: inspect.Parameter, adapter: Adapter, order: list[str]) -> str:
    """What a parameter is given, "" for nothing; ``order`` is what is left of the adapter's."""
    by_name = NAMES.get(parameter.name.lower(), "")
    if parameter.name in adapter.parameters:
        return adapter.parameters[parameter.name]
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return ""
    if not order or parameter.kind is parameter.KEYWORD_ONLY:
        return by_name
    role = order.pop(0)
    if by_name and ONE.get(by_name, by_name) != ONE.get(role, role):
        raise ConfigError(
            f"reward {name!r}: adapter {adapter.like!r} gives {role} in the place of the parameter {parameter.name!r}: "
            "expected an adapter of that order, or none"
        )
    return role


def _require_no_default(name: str, parameter: inspect.Parameter, role: str, adapter: Adapter) -> None:
    """Refuse a parameter that would be bound by its name alone and has a value of its own: it may be a setting."""
    default, told = parameter.default, bool(adapter.like) or parameter.name in adapter.parameters
    if told or not default or not isinstance(default, str | int | float):
        return
    raise ConfigError(
        f"reward {name!r}: is its parameter {parameter.name!r} = {default!r} a setting, or the {role} of the samples? "
        f"expected its option {{{parameter.name}: {default!r}}}, or {{adapter: {{parameters: {{{parameter.name}: "
        f"{role}}}}}}}"
    )


def _annotated(parameter: inspect.Parameter) -> str:
    return "" if parameter.annotation is parameter.empty else str(parameter.annotation)


def remedy(signature: inspect.Signature) -> str:
    """How a parameter is named that can be bound, or bound by the option."""
    first = next((p for p in signature.parameters if p.lower() not in NAMES), "images")
    return (
        f": expected parameters named samples or images (or image), cond, prompts (or prompt), metadata, or its option "
        f"adapter, such as {{adapter: ddpo}} ({', '.join(LIKE)}) or {{adapter: {{parameters: {{{first}: images}}}}}}"
    )


def _format(name: str, signature: inspect.Signature, roles: Mapping[str, str], adapter: Adapter, method: str) -> str:
    if told := adapter.told("images"):
        return told
    parameter = next(p for p, role in roles.items() if ONE.get(role, role) == "images")
    annotation = _annotated(signature.parameters[parameter])
    if not annotation:
        return "pil" if method == "score" else "tensor"
    if re.search(r"\bTensor\b", annotation):
        return "tensor"
    if re.search(r"\bImage\b", annotation):
        return "pil"
    if re.search(r"\bndarray\b|NDArray", annotation):
        return "numpy"
    if re.search(r"\b(str|Path|bytes|int)\b", annotation):
        raise ConfigError(
            f"reward {name!r}: its {parameter!r} is {annotation}, no image: expected a scorer of images, or its option "
            f"{{adapter: {{images: {' | '.join(FORMATS)}}}}}"
        )
    return "tensor"


def _each(name: str, roles: Mapping[str, str], listed: set[str], adapter: Adapter, method: str) -> bool:
    """Whether a call has one sample: where the names are singular, and no annotation says a list."""
    if (told := adapter.told("each", None)) is not None:
        return bool(told)
    single = {role in ONE and role not in listed for role in roles.values() if role in (*ONE, *ONE.values())}
    if len(single) == 1:
        return single.pop()
    if method == "score" and "prompt" in roles.values():  # ImageReward's: one prompt, a list of images
        return True
    raise ConfigError(
        f"reward {name!r}({', '.join(roles)}): one sample a call, or all? expected names that agree (image, prompt or "
        "images, prompts), or its option {adapter: {each: true}} or {adapter: {each: false}}"
    )


class Adapted(nn.Module):
    """A scorer as a reward, (samples, cond) -> (B,)."""

    def __init__(
        self,
        name: str,
        scorer: Callable[..., Any],
        bound: Bound,
        task_info: Mapping[str, Any],
        weights: Mapping[str, float],
        inside: object = None,
    ) -> None:
        """``task_info`` is as ``registry.task_info`` gives it; ``inside`` is the object whose method the scorer is."""
        super().__init__()
        self.name, self.bound, self.weights = name, bound, dict(weights)
        self._task_info, self._scorer = task_info, scorer
        if isinstance(inside, nn.Module):
            self.inside = inside

    def forward(self, samples: Tensor, cond: Cond) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 -> (B,).

        Raises:
            ConfigError: words are asked for where the model has none.
            RewardError: an answer that is not one number a sample.
        """
        count, wanted = len(samples), set(self.bound.roles.values())
        given: dict[str, Any] = {"images": converted(samples, self.bound.images, self.name), "cond": cond}
        for fact in {"prompts", "metadata"} & {ONE.get(role, role) for role in wanted}:
            given[fact] = self._rows(fact, cond, count)
        if not self.bound.each:
            return scores(self._call(given), count, self.name, self.weights).to(samples.device)
        answers = [self._one({key: _item(held, i) for key, held in given.items()}) for i in range(count)]
        return torch.stack([answer.to(samples.device) for answer in answers])

    def _one(self, given: dict[str, Any]) -> Tensor:
        """The score of one sample, ()."""
        if "images" in self.bound.roles.values():
            given["images"] = given["images"][None] if isinstance(given["images"], Tensor) else [given["images"]]
        return one_score(self._call(given), self.name, self.weights)

    def _call(self, given: Mapping[str, Any]) -> Any:
        told = {name: given[ONE.get(role, role)] for name, role in self.bound.roles.items()}
        named = {name: told.pop(name) for name in self.bound.keywords}
        return self._scorer(*told.values(), **named)

    def _rows(self, fact: str, cond: Cond, count: int) -> list[Any]:
        """The words, or the metadata, of each sample."""
        held: Sequence[Any] = self._task_info.get(fact, ())
        if not held:
            raise ConfigError(f"reward {self.name!r} asks for {fact}: expected a model with prompts")
        return [held[i] for i in require_labels(cond, count, len(held), f"reward {self.name!r}").tolist()]


def _item(held: Any, i: int) -> Any:
    return map_cond(lambda c: c[i], held) if isinstance(held, dict) else None if held is None else held[i]


def converted(samples: Tensor, kind: str, name: str) -> Any:
    """Samples (B, C, H, W) in [0, 1] as a scorer wants them, see ``FORMATS``; grey ones as RGB where they are PIL's.

    Raises:
        ConfigError: they have more channels than such images.
    """
    if kind == "tensor":
        return samples
    grey = samples.detach().mul(255).round().clamp(0, 255).to(torch.uint8)
    if kind == "uint8":
        return grey
    if samples.shape[1] not in (1, 3):
        raise ConfigError(
            f"reward {name!r} takes {kind} images: expected samples of 1 or 3 channels, got {samples.shape[1]}"
        )
    array = grey.permute(0, 2, 3, 1).cpu().numpy()
    if kind == "numpy":
        return array
    from PIL import Image

    return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB") for image in array]


def adapted(
    name: str,
    scorer: Callable[..., Any],
    inside: object,
    options: Mapping[str, Any],
    adapter: Adapter,
    task_info: Mapping[str, Any],
    method: str = "",
) -> Any:
    """The reward that a scorer is; itself where it is one already. ``options`` are given to it by keyword."""
    signature = signature_of(name, scorer)
    settled = {*options, *(fixed(scorer) - set(adapter.parameters))}
    left = [p for p in signature.parameters.values() if p.name not in settled]
    bound = bind(name, signature.replace(parameters=left), adapter, method)
    if bound.native and inside is scorer and not adapter.scores:
        return None
    say_once(
        f"reward {name!r} is called as {bound}" + ("" if adapter != Adapter() else ", as its parameters' names say")
    )

    def call(*args: Any, **named: Any) -> Any:
        return scorer(*args, **named, **options)

    return Adapted(name, call, bound, task_info, adapter.scores, inside)


def signature_of(name: str, scorer: Callable[..., Any]) -> inspect.Signature:
    """The signature of what is called: of a module, that of its ``forward``.

    Raises:
        ConfigError: it has none that can be read.
    """
    called = _flat(scorer.forward if isinstance(scorer, nn.Module) else scorer)
    try:
        return inspect.signature(called)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"reward {name!r}: its parameters cannot be read: expected a function around it with named ones"
        ) from error


def fixed(scorer: Callable[..., Any]) -> set[str]:
    """The keywords that functools.partial has fixed: they stand, unless an option or the adapter names them."""
    called = scorer.forward if isinstance(scorer, nn.Module) else scorer
    if not isinstance(called, functools.partial):
        called = getattr(called, "__call__", None)  # noqa: B004 - of a class with a partialmethod
    return set(_flat(called).keywords) if isinstance(called, functools.partial) else set()


def whole(thing: Any) -> Any:
    """What functools.partial is a part of; else the thing itself."""
    return _flat(thing).func if isinstance(thing, functools.partial) else thing


def _flat(thing: Any) -> Any:
    """A partial of a partial as one, without the ``__wrapped__`` for which inspect would overlook what it fixes."""
    if not isinstance(thing, functools.partial):
        return thing
    inner = _flat(thing.func)
    if not isinstance(inner, functools.partial):
        return functools.partial(inner, *thing.args, **thing.keywords)
    return functools.partial(inner.func, *inner.args, *thing.args, **{**inner.keywords, **thing.keywords})
