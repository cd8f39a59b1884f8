"""What is asked of a reward elsewhere and what it answers: the same two frames over HTTP and between Ray actors.

    question   samples (B, C, H, W), cond, and the facts of the model (prompts, shape, classes)
    answer     values (B,), NaN for the items in ``errors``, which says why, by item; the identity of the reward

A reward that raises for a batch is asked for each sample alone, so that one broken sample costs no other its value.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlfusion.rewards.base import Reward, RewardError, RewardFailure, well_formed
from rlfusion.rewards.frames import FrameError, decode, encode
from rlfusion.rewards.grouped import needs_groups
from rlfusion.tensors import Cond, map_cond

LONGEST = 500
"""Characters of an error that are sent."""


class Question(NamedTuple):
    """Samples to be scored elsewhere."""

    samples: Tensor
    cond: Cond
    facts: dict[str, Any]


def ask(samples: Tensor, cond: Cond, facts: Mapping[str, Any]) -> bytes:
    """The frame of a question. Tensors are sent as they are, without gradient."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
    return encode({"samples": samples, "cond": cond, "facts": plain})


def asked(frame: bytes) -> Question:
    """The question of a frame.

    Raises:
        FrameError: the frame holds no question: samples (B, C, H, W) of floats, B > 0, and a condition of batch B.
    """
    question = _fields(decode(frame), "samples", "cond", "facts")
    samples, cond, facts = (question[name] for name in ("samples", "cond", "facts"))
    if not isinstance(samples, Tensor) or samples.ndim != 4 or not samples.is_floating_point() or not len(samples):
        raise FrameError("expected samples (B, C, H, W) of floating-point numbers, B > 0")
    sizes: list[int] = []
    try:
        map_cond(lambda c: sizes.append(len(c)) or c, cond)
    except TypeError as error:
        raise FrameError(str(error)) from error
    if set(sizes) - {len(samples)} or not isinstance(facts, dict):
        raise FrameError(f"expected a condition of batch {len(samples)} and facts: got batches {sizes}")
    return Question(samples, cond, facts)


def greeted(frame: bytes) -> dict[str, Any]:
    """The facts of a frame that asks what is served for them.

    Raises:
        FrameError: the frame holds no facts.
    """
    facts = _fields(decode(frame), "facts")["facts"]
    if not isinstance(facts, dict):
        raise FrameError(f"expected facts by name: got {type(facts).__name__}")
    return facts


def answer(reward: Reward, identity: str, question: Question, device: str = "cpu") -> bytes:
    """The frame of a reward's answer; what it could not score is an error per item, never an exception."""
    samples = question.samples.to(device)
    cond = map_cond(lambda c: c.to(device), question.cond)
    values, reasons = graded(reward, samples, cond)
    errors = {i: reason[:LONGEST] for i, reason in reasons.items()}
    return encode({"values": values, "errors": errors, "identity": identity})


@torch.no_grad()
def graded(reward: Reward, samples: Tensor, cond: Cond) -> tuple[Tensor, dict[int, str]]:
    """The values (B,) of samples, NaN for those that failed, and why each of these did."""
    try:
        values, reasons = well_formed(reward(samples, cond), samples, "it"), {}
    except RewardFailure as failure:
        values, reasons = failure.values, failure.reasons
    except Exception as error:  # whatever a user's reward raises is told to the asker, item by item
        if len(samples) == 1 or isinstance(error, RewardError) or needs_groups(reward):
            failed = torch.full((len(samples),), torch.nan, device=samples.device)
            return failed, dict.fromkeys(range(len(samples)), _said(error))
        return _one_by_one(reward, samples, cond)
    odd = {i: f"answered {values[i].item()}" for i in (~values.isfinite()).nonzero().flatten().tolist()}
    values = values.masked_fill(~values.isfinite(), math.nan)
    return values, odd | reasons


def _one_by_one(reward: Reward, samples: Tensor, cond: Cond) -> tuple[Tensor, dict[int, str]]:
    values, reasons = [], {}
    for i in range(len(samples)):
        value, why = graded(reward, samples[i : i + 1], map_cond(lambda c, i=i: c[i : i + 1], cond))
        values.append(value)
        if why:
            reasons[i] = why[0]
    return torch.cat(values), reasons


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Answer(NamedTuple):
    """What came back: values (B,), NaN where ``errors`` says why, and the identity of the reward that answered."""

    values: Tensor
    errors: dict[int, str]
    identity: str

    def checked(self, name: str) -> Tensor:
        """The values.

        Raises:
            RewardFailure: some could not be scored.
        """
        if self.errors:
            raise RewardFailure(name, self.values, self.errors)
        return self.values


def answered(frame: bytes, count: int) -> Answer:
    """The answer of a frame, for ``count`` samples.

    Raises:
        FrameError: the frame holds no such answer.
    """
    found = _fields(decode(frame), "values", "errors", "identity")
    values, errors, identity = (found[name] for name in ("values", "errors", "identity"))
    if not isinstance(values, Tensor) or values.shape != (count,) or not values.is_floating_point():
        raise FrameError(f"expected values ({count},)")
    if not isinstance(errors, dict) or not isinstance(identity, str):
        raise FrameError("expected errors by item, and an identity")
    failed = set((~values.isfinite()).nonzero().flatten().tolist())
    if failed != set(errors):
        raise FrameError(f"errors for the items {list(errors)[:10]}, no value for the items {sorted(failed)[:10]}")
    return Answer(values, {i: str(errors[i]) for i in sorted(errors)}, identity)


def _fields(message: Any, *names: str) -> dict[str, Any]:
    if not isinstance(message, dict) or set(message) != set(names):
        raise FrameError(f"expected a message of {', '.join(names)}")
    return message
