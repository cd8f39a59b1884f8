"""Scorers of other libraries as rewards: how they are called, and how their answers are read.

``binding`` says what each of their parameters is given, by its name.
Images are a float tensor (B, C, H, W) in [0, 1], through which gradients pass; where the annotation says PIL's Image
or a numpy array, 8-bit ones, without gradient. A method ``score`` is called as ImageReward's: one prompt, PIL images.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.notices import say_once
from rlfusion.common.tensors import Cond, map_cond
from rlfusion.common.user_code import called
from rlfusion.rewards.answers import one_score, scores
from rlfusion.rewards.base import require_labels
from rlfusion.rewards.binding import ONE, Adapter, Bound, bind


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
    """Samples (B, C, H, W) in [0, 1] in a format of ``binding.FORMATS``; as PIL images, grey ones are RGB.

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
        with called(f"reward {name!r}"):
            return scorer(*args, **named, **options)

    return Adapted(name, call, bound, task_info, adapter.scores, inside)


def signature_of(name: str, scorer: Callable[..., Any]) -> inspect.Signature:
    """The signature of what is called: of a module, that of its ``forward``.

    Raises:
        ConfigError: it has none that can be read, or is async.
    """
    read = _flat(scorer.forward if isinstance(scorer, nn.Module) else scorer)
    if any(map(_is_async, (read, getattr(read, "__call__", None)))):  # noqa: B004 - of an object, what is called
        raise ConfigError(f"reward {name!r} is async: expected a function that returns the scores (asyncio.run in it)")
    try:
        return inspect.signature(read)
    except (ValueError, TypeError, AttributeError) as error:  # the last of a module of TorchScript
        raise ConfigError(
            f"reward {name!r}: its parameters cannot be read: expected a function around it with named ones"
        ) from error


def _is_async(thing: Any) -> bool:
    return inspect.iscoroutinefunction(thing) or inspect.isasyncgenfunction(thing)


def fixed(scorer: Callable[..., Any]) -> set[str]:
    """The keywords that functools.partial has fixed: they stand, unless an option or the adapter names them."""
    held = scorer.forward if isinstance(scorer, nn.Module) else scorer
    if not isinstance(held, functools.partial):
        held = getattr(held, "__call__", None)  # noqa: B004 - of a class with a partialmethod
    return set(_flat(held).keywords) if isinstance(held, functools.partial) else set()


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
