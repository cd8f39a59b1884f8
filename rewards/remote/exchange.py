"""The question to a reward elsewhere and its answer: the same frames over HTTP and between Ray actors.

    greeting   the task's prompts, their metadata, shape and classes (key ``facts``): once
    question   samples (B, C, H, W) in [0, 1], cond, and the digest of the greeting (key ``table``; "" for no facts)
    answer     values (B,), NaN for the items in ``errors``, which says why, by item, and where the user's own code
               raised; the identity of the reward, and the digest of the question

A question is refused, and not scored, where its samples are not finite or outside [0, 1], where their shape is not that
of the task info, or a label of the condition is none of its classes. A reward that raises for a batch is asked for
each sample alone, so that one broken sample costs no other its value.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from rlfusion.common.tensors import Cond, map_cond
from rlfusion.rewards.base import Reward, RewardFailure, RewardRaised
from rlfusion.rewards.remote.frames import (
    FrameError,
    decode,
    digest_of,
    encode,
    fields_of,
    packed,
    strict_json,
    unpacked,
)
from rlfusion.rewards.remote.grading import graded
from rlfusion.rewards.remote.tables import UnknownTable

LONGEST = 500
"""Characters of an error that are sent."""
TOLERANCE = 1e-3
"""By which a sample's value may lie outside [0, 1]: rounding, also in 16 bits."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
_IDENTITY, _TABLE = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}")


class QuestionError(FrameError):
    """A whole frame that is no question, or one that cannot be scored: it says what was expected."""


class Question(NamedTuple):
    """Samples to be scored elsewhere, what is known of their model, and by which greeting; and the digest of the frame
    that they came in.
    """

    samples: Tensor
    cond: Cond
    task_info: dict[str, Any]
    table: str
    digest: str


class Known(Protocol):
    """Task infos by the digests of their greetings."""

    def __getitem__(self, digest: str, /) -> dict[str, Any]:
        """Raises KeyError."""


def ask(samples: Tensor, cond: Cond, table: str = "") -> bytes:
    """The frame of a question; ``table`` as of ``table_of``. Tensors are sent as they are, without gradient."""
    return encode({"samples": samples, "cond": cond, "table": table})


def greet(task_info: Mapping[str, Any]) -> bytes:
    """The frame that asks what is served for a model of this task info."""
    return encode({"facts": _sent(task_info)})


def table_of(task_info: Mapping[str, Any]) -> str:
    """How questions name this task info: the digest of its greeting, hexadecimal; "" for none."""
    return digest_of(greet(task_info)) if task_info else ""


def asked(frame: bytes, tables: Known | None = None) -> Question:
    """The question of a frame, to one whom the ``tables`` were told, none by default.

    Raises:
        FrameError: the frame is none.
        UnknownTable: it names a table that is none of them.
        QuestionError: it holds no question that can be scored: samples (B, C, H, W) of floating-point numbers in
            [0, 1], B > 0, of the shape that the task info says, and a condition of batch B, whose labels are among the
            task info's classes.
    """
    samples, cond, table = _question(frame, "samples", "cond", "table").values()
    task_info = _known(table, {} if tables is None else tables)
    _require_samples(samples, task_info)
    _require_condition(cond, len(samples), task_info)
    return Question(samples, cond, task_info, table, digest_of(frame))


def greeted(frame: bytes) -> dict[str, Any]:
    """The task info of a frame that asks what is served for it.

    Raises:
        FrameError: the frame is none.
        QuestionError: it holds no task info.
    """
    return _task_info(_question(frame, "facts")["facts"])


def _known(table: Any, tables: Known) -> dict[str, Any]:
    if table == "":
        return {}
    if not isinstance(table, str) or not _TABLE.fullmatch(table):
        raise QuestionError(f"table {_shown(table)}: expected 64 hexadecimal digits, or none")
    try:
        return tables[table]
    except KeyError:
        raise UnknownTable(f"prompts of digest {table[:12]} are not known here: expected a greeting first") from None


def _question(frame: bytes, *names: str) -> dict[str, Any]:
    message = decode(frame)
    try:
        return fields_of(message, "a message", *names)
    except FrameError as error:
        raise QuestionError(str(error)) from error


def _sent(task_info: Mapping[str, Any]) -> dict[str, Any]:
    """Task info as a message holds it: texts packed, each prompt's metadata, if any, as a JSON text."""
    plain = {key: packed(value) if key == "prompts" else _listed(value) for key, value in task_info.items()}
    metadata = plain.pop("metadata", ())
    if any(metadata):
        plain["metadata"] = packed([json.dumps(held, allow_nan=False, ensure_ascii=False) for held in metadata])
    return plain


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _task_info(told: Any) -> dict[str, Any]:
    """The task info that was ``_sent``: all of it, or none."""
    if told == {}:
        return {}
    try:
        more = ("metadata",) if isinstance(told, dict) and "metadata" in told else ()
        found = fields_of(told, "facts", "prompts", "shape", "classes", *more)
        found["prompts"] = unpacked(found["prompts"], "the facts' prompts")
        found["metadata"] = _metadata(found, len(found["prompts"]))
    except FrameError as error:
        raise QuestionError(str(error)) from error
    shape, classes = found["shape"], found["classes"]
    if not isinstance(shape, list) or len(shape) != 3 or any(type(size) is not int or size < 1 for size in shape):
        raise QuestionError(f"the facts' shape = {_shown(shape)}: expected (C, H, W), integers above 0")
    if type(classes) is not int or classes != len(found["prompts"]):
        raise QuestionError(f"the facts' classes = {_shown(classes)}: expected {len(found['prompts'])}, one a prompt")
    return found


def _metadata(told: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The metadata of each of ``count`` prompts."""
    if "metadata" not in told:
        return [{} for _ in range(count)]
    what = "the facts' metadata"
    found = [strict_json(text.encode(), what) for text in unpacked(told["metadata"], what)]
    if len(found) != count or not all(isinstance(held, dict) for held in found):
        raise FrameError(f"{what}: expected {count} objects, one a prompt")
    return found


def _require_samples(samples: Any, task_info: Mapping[str, Any]) -> None:
    if not isinstance(samples, Tensor) or samples.ndim != 4 or samples.dtype not in FLOATS or not samples.numel():
        raise QuestionError(
            f"samples {_kind(samples)}: expected (B, C, H, W) of floating-point numbers, none of the four 0"
        )
    if task_info and list(samples.shape[1:]) != task_info["shape"]:
        raise QuestionError(f"samples {_kind(samples)}: expected {task_info['shape']} each, as the facts say")
    least, most = (value.item() for value in samples.aminmax())
    if not -TOLERANCE <= least <= most <= 1 + TOLERANCE:  # a NaN is in no range
        raise QuestionError(
            f"samples from {least:g} to {most:g}: expected values in [0, 1], up to {TOLERANCE:g} beside"
        )


def _require_condition(cond: Cond, count: int, task_info: Mapping[str, Any]) -> None:
    """``cond`` is of batch ``count``; numbers are finite; labels, (B,) of integers, are in 0..classes-1."""

    def check(part: Tensor) -> Tensor:
        if part.ndim < 1 or len(part) != count:
            raise QuestionError(f"a condition {_kind(part)}: expected one of batch {count}")
        if part.dtype in FLOATS:
            if not bool(part.isfinite().all()):
                raise QuestionError(f"a condition {_kind(part)} that is not finite: expected finite numbers")
        elif part.dtype not in INTEGERS:
            raise QuestionError(f"a condition {_kind(part)}: expected floating-point numbers or int32, int64")
        return part

    try:
        map_cond(check, cond)
    except TypeError as error:
        raise QuestionError(f"cond: expected None, a tensor or a dict of tensors ({error})") from error
    if isinstance(cond, Tensor) and cond.dtype in INTEGERS and cond.ndim == 1:
        least, most = (int(value) for value in cond.aminmax())
        if least < 0 or (task_info and most >= task_info["classes"]):
            known = f"0..{task_info['classes'] - 1}" if task_info else "0 and above"
            raise QuestionError(f"labels from {least} to {most}: expected {known}")


def _shown(value: Any) -> str:
    """A value of a message, whatever it is, in a line."""
    return " ".join(f"{value!r:.100}".split())


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else f"of a {type(value).__name__}"


def answer(reward: Reward, identity: str, question: Question, device: str = "cpu") -> bytes:
    """The frame of a reward's answer; what it could not score is an error per item, never an exception."""
    samples = question.samples.to(device)
    cond = map_cond(lambda c: c.to(device), question.cond)
    values, reasons, raised = graded(reward, samples, cond)
    return encode(Answer(values, reasons, identity, raised).sent(question.digest))


class Answer(NamedTuple):
    """An answer: values (B,), NaN where ``errors`` says why, the identity of the reward that answered, and the items
    for which the user's own code raised.
    """

    values: Tensor
    errors: dict[int, str]
    identity: str
    raised: frozenset[int] = frozenset()

    def sent(self, question: str) -> dict[str, Any]:
        """The message that ``answered`` reads, to the question of this digest."""
        items = sorted(self.errors)
        reasons = [self.errors[i][:LONGEST].encode(errors="replace").decode() for i in items]
        raised = torch.tensor([i in self.raised for i in items], dtype=torch.uint8)
        errors = {"items": torch.tensor(items, dtype=torch.int64), "reasons": packed(reasons), "raised": raised}
        return {"values": self.values, "errors": errors, "identity": self.identity, "question": question}

    def checked(self, name: str, failure: type[RewardFailure] | None = None) -> Tensor:
        """The values.

        Raises:
            RewardFailure: some could not be scored; of the kind ``failure``, where it is given.
            RewardRaised: of some the user's own code raised.
        """
        if self.errors:
            kind = failure or (RewardRaised if self.raised else RewardFailure)
            raise kind(name, self.values, self.errors)
        return self.values


def answered(frame: bytes, count: int, question: bytes) -> Answer:
    """The answer of a frame, for the ``count`` samples of the frame ``question``.

    Raises:
        FrameError: the frame holds no such answer.
    """
    values, errors, identity, digest = fields_of(
        decode(frame), "a message", "values", "errors", "identity", "question"
    ).values()
    if digest != digest_of(question):
        raise FrameError("the answer is to another question")
    if not isinstance(values, Tensor) or values.shape != (count,) or values.dtype not in FLOATS:
        raise FrameError(f"values {_kind(values)}: expected values ({count},) of floating-point numbers")
    if not isinstance(identity, str) or not _IDENTITY.fullmatch(identity):
        raise FrameError(f"identity {_shown(identity)}: expected 16 hexadecimal digits")
    reasons, raised = _reasons(errors)
    failed = values.isnan().nonzero().flatten().tolist()
    if failed != list(reasons) or bool(values.isinf().any()):
        raise FrameError(f"errors for the items {list(reasons)[:10]}, no number for the items {failed[:10]}")
    return Answer(values, reasons, identity, raised)


def _reasons(errors: Any) -> tuple[dict[int, str], frozenset[int]]:
    """Why items failed, by item, in their order; and for which of them the user's own code raised."""
    items, told, raised = fields_of(errors, "errors", "items", "reasons", "raised").values()
    reasons = unpacked(told, "the errors' reasons")
    if not isinstance(items, Tensor) or items.dtype != torch.int64 or items.shape != (len(reasons),):
        raise FrameError(f"the errors' items {_kind(items)}: expected int64 ({len(reasons)},)")
    found = dict(zip(items.tolist(), reasons))
    if len(found) != len(reasons):
        raise FrameError("the errors' items: one comes twice")
    if not isinstance(raised, Tensor) or raised.dtype != torch.uint8 or raised.shape != items.shape:
        raise FrameError(f"the errors' raised {_kind(raised)}: expected uint8 ({len(reasons)},)")
    if bool((raised > 1).any()):
        raise FrameError("the errors' raised: expected 0 or 1 an item")
    return found, frozenset(items[raised.bool()].tolist())
