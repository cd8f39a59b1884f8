"""What each parameter of a scorer of another library is given, by its name.

    images, samples, imgs, pixels, x      the batch; image, img: one sample a call
    prompts, texts, captions              the words (B,); prompt, text, caption: those of one sample
    metadata                              what else is known of the prompt of each sample, a list of B mappings
    cond, condition, label(s), c          the condition (B,)

A parameter that no name binds is an error; ``Adapter``, an option of every reward, says what cannot be recognised.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from rlfusion.common.errors import ConfigError, unknown

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
