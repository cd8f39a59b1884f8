"""Damaged and malicious frames: each is refused in one line with its status, in bounded time and memory, on both sides.

Most go to ``decode`` and to the ASGI application without a socket; a few go over one.
"""

import asyncio
import json
import math
import random
import resource
import socket
import struct
import threading
import time
import tracemalloc
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
import torch
from reward_servers import IDENTITY, Faulty, client, framed, serving

from rlfusion.common.errors import ConfigError
from rlfusion.rewards import task_info
from rlfusion.rewards.remote.exchange import Answer, answer, answered, ask, asked, greet, greeted, table_of
from rlfusion.rewards.remote.frames import (
    DIGESTED,
    HEAD,
    MAGIC,
    MOST_DEPTH,
    MOST_ENTRIES,
    MOST_TENSORS,
    MOST_TEXT,
    FrameError,
    decode,
    digest_of,
    encode,
    packed,
    strict_json,
)
from rlfusion.rewards.remote.offer import Limits, Offer
from rlfusion.rewards.remote.server import ASKING, Service, application

FACTS = task_info(("zero", "one", "zwei"), (1, 4, 4))
DAMAGED, MALFORMED, UNSCORABLE, UNKNOWN = 412, 400, 422, 428


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SAMPLES = torch.rand(6, 1, 4, 4, generator=generator(0))
LABELS = torch.arange(6) % 3
GREETING, TABLE = greet(FACTS), table_of(FACTS)
KNOWN = {TABLE: greeted(GREETING)}
QUESTION = ask(SAMPLES, LABELS, TABLE)


def mean(samples, cond):
    return samples.mean((1, 2, 3))


def sent(frame: bytes, path: str = "/score", headers: dict[str, str] | None = None, app=None) -> tuple[int, bytes]:
    """What an application answers to a body, without a socket."""
    said = {"content-length": str(len(frame))} | (headers or {})
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in said.items()],
    }
    found: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": frame, "more_body": False}

    async def send(message):
        found.append(message)

    asyncio.run((app or APP)(scope, receive, send))
    return found[0]["status"], found[1]["body"]


SCORED: list[int] = []


def counted(samples, cond):
    SCORED.append(len(samples))
    return mean(samples, cond)


APP = application(Service(Offer("it", {}, (), lambda task_info: counted), "", Limits(10**6, 20.0, 10**7)))


@pytest.fixture(autouse=True, scope="module")
def greeting():
    """The application knows the prompts of the questions."""
    assert sent(GREETING, "/hello")[0] == 200


def assert_refused(frame: bytes, *statuses: int, path: str = "/score") -> str:
    SCORED.clear()
    status, said = sent(frame, path)
    assert status in statuses, said
    assert not SCORED
    text = said.decode()
    assert "\n" not in text
    assert 0 < len(text) <= 1000
    return text


# --- damage on the way ---


def test_a_whole_question_is_scored():
    status, said = sent(QUESTION)
    assert status == 200
    assert torch.equal(answered(said, 6, QUESTION).values, mean(SAMPLES, None))


def test_hundred_flipped_bits_in_a_question_are_each_refused_and_never_scored():
    choose = random.Random(0)
    for bit in [*range(8 * len(MAGIC)), *choose.sample(range(8 * len(QUESTION)), 120)]:
        broken = bytearray(QUESTION)
        broken[bit // 8] ^= 1 << bit % 8
        assert_refused(bytes(broken), MALFORMED if bit < 8 * len(MAGIC) else DAMAGED)


def test_truncated_and_lengthened_questions_are_refused():
    choose = random.Random(1)
    for length in [0, 1, 3, 4, HEAD.size - 1, HEAD.size, *choose.sample(range(len(QUESTION)), 40)]:
        assert_refused(QUESTION[:length], DAMAGED if length >= len(MAGIC) else MALFORMED)
    for more in (b"\0", b"x" * 1000, QUESTION):
        assert_refused(QUESTION + more, DAMAGED)


def test_swapped_and_zeroed_blocks_are_refused():
    choose = random.Random(2)
    for _ in range(30):
        broken = bytearray(QUESTION)
        a, b = choose.sample(range(len(MAGIC), len(QUESTION) - 8), 2)
        broken[a : a + 8], broken[b : b + 8] = QUESTION[b : b + 8], bytes(8)
        if broken != QUESTION:
            assert_refused(bytes(broken), DAMAGED)


def test_every_flipped_bit_of_an_answer_is_refused():
    frame = answer(mean, IDENTITY, asked(QUESTION, KNOWN))
    for bit in random.Random(3).sample(range(8 * len(frame)), 400):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            answered(bytes(broken), 6, QUESTION)


@pytest.mark.parametrize(("text", "blob"), [(2**32 - 1, 2**64 - 1), (0, 2**63), (10**6, 0), (0, 0), (7, 10**9)])
def test_lengths_that_lie_cost_nothing(text, blob):
    head = HEAD.pack(MAGIC, text, blob, bytes(32))
    assert_refused(head + QUESTION[HEAD.size :], DAMAGED)


# --- whole frames, digest and all, that no honest asker writes ---


def deep(brackets: bytes, count: int) -> bytes:
    return brackets[:1] * count + brackets[1:] * count


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def blob(header, data: bytes = bytes(4)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HEADERS = {
    "nothing": b"",
    "nested lists": deep(b"[]", 30_000),
    "a list of lists": b"[" + b"[]," * 20_000 + b"[]]",
    "a list of dicts": b"[" + b"{}," * 20_000 + b"{}]",
    "numbers": b"[" + b"1," * 30_000 + b"1]",
    "nested dicts": b'{"a":' * 200 + b"1" + b"}" * 200,
    "quotes without end": b'"\\' * 32_000,
    "backslashes": b'"' + b"\\" * 60_000,
    "brackets without end": b"[" * 4000,
    "too long": b'"' + b"x" * MOST_TEXT + b'"',
    "a long number": b"9" * 60_000,
    "a large exponent": b"1e999",
    "NaN": b"NaN",
    "minus infinity": b"-Infinity",
    "not UTF-8": b'"\xff\xfe"',
    "UTF-16": '{"dict": []}'.encode("utf-16"),
    "UTF-32": '{"dict": []}'.encode("utf-32"),
    "a BOM": b"\xef\xbb\xbf{}",
    "NUL": b"\0" * 100,
    "NUL inside": b'{"dict"\0: []}',
    "half a surrogate": b'"\\ud800"',
    "a key twice": b'{"tensor": "a", "tensor": "b"}',
    "an entry twice": b'{"dict": [["a", 1], ["a", 2]]}',
    "an unknown tag": b'{"dikt": [["a", 1]]}',
    "two tags": b'{"dict": [], "tuple": []}',
    "no tag": b"{}",
    "a tag of a word": b'{"tuple": "abc"}',
    "a dict of a word": b'{"dict": "abc"}',
    "a key that is a list": b'{"dict": [[[1], 2]]}',
    "a key that is true": b'{"dict": [[true, 2]]}',
    "a float of another kind": b'{"float": "1e3"}',
    "a tensor that is not there": b'{"tensor": "a"}',
    "a tensor named by a list": b'{"tensor": [1]}',
    "words after it": b"[] []",
    "a comment": b"[] // that is all",
    "single quotes": b"{'dict': []}",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_of_another_kind_is_refused(name):
    assert_refused(framed(HEADERS[name], blob({}, b"")), MALFORMED)


BLOBS = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "a header longer than all": struct.pack("<Q", 2**63) + b"{}",
    "nested lists": blob(deep(b"[]", 30_000)),
    "fifteen megabytes": blob(b'{"a":' + b"[[]," * (15 * 2**20 // 4) + b"}"),
    "many tensors": blob({str(n): TENSOR for n in range(MOST_TENSORS + 1)}),
    "very many tensors": blob({str(n): TENSOR for n in range(100_000)}),
    "a list": blob([TENSOR]),
    "a number": blob(b"1"),
    "no shape": blob({"a": {"dtype": "F32", "data_offsets": [0, 4]}}),
    "an unknown key": blob({"a": TENSOR | {"device": "cuda"}}),
    "metadata": blob({"a": TENSOR, "__metadata__": {"format": "pt"}}),
    "a tensor twice": blob(b'{"a": %b, "a": %b}' % ((json.dumps(TENSOR).encode(),) * 2)),
    "a dtype of 8 bits": blob({"a": TENSOR | {"dtype": "F8_E4M3"}}),
    "complex": blob({"a": TENSOR | {"dtype": "C64"}}, bytes(8)),
    "booleans": blob({"a": TENSOR | {"dtype": "BOOL", "shape": [4]}}, b"\7" * 4),
    "no dtype": blob({"a": TENSOR | {"dtype": None}}),
    "a dtype of a list": blob({"a": TENSOR | {"dtype": ["F32"]}}),
    "a negative shape": blob({"a": TENSOR | {"shape": [-1]}}),
    "a huge shape": blob({"a": TENSOR | {"shape": [2**62]}}),
    "a shape beyond 64 bits": blob({"a": TENSOR | {"shape": [2**40, 2**40]}}),
    "a shape of words": blob({"a": TENSOR | {"shape": ["1"]}}),
    "a shape of fractions": blob({"a": TENSOR | {"shape": [1.0]}}),
    "a shape that is none": blob({"a": TENSOR | {"shape": 1}}),
    "a shape of NaN": blob(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}'),
    "offsets behind the end": blob({"a": TENSOR | {"data_offsets": [0, 8]}}),
    "offsets backwards": blob({"a": TENSOR | {"data_offsets": [4, 0]}}),
    "offsets below 0": blob({"a": TENSOR | {"data_offsets": [-4, 0]}}),
    "offsets that overlap": blob({"a": TENSOR, "b": TENSOR}),
    "bytes left over": blob({"a": TENSOR}, bytes(5)),
    "bytes missing": blob({"a": TENSOR}, bytes(3)),
    "not UTF-8": blob(b'{"\xff": 1}'),
    "a name of NUL and no tensor": blob(b'{"\0": 1}'),
    "a tensor that nobody names": blob({"b": TENSOR}),
    "a tensor beside the one that is named": blob({"a": TENSOR, "b": TENSOR | {"data_offsets": [4, 8]}}, bytes(8)),
}


@pytest.mark.parametrize("name", BLOBS)
def test_a_blob_of_another_kind_is_refused(name):
    frame = framed(b'{"tensor": "a"}', BLOBS[name])
    SCORED.clear()
    assert len(frame) < 20 * 2**20
    with pytest.raises(FrameError) as caught:
        decode(frame)
    assert len(str(caught.value)) < 1000
    if len(frame) < 10**6:
        assert_refused(frame, MALFORMED)


@pytest.mark.alone
def test_a_header_of_fifteen_megabytes_costs_neither_time_nor_memory():
    """It took 3 CPU seconds and a gigabyte before anything was refused."""
    nested = b'["samples",' + b"[[]," * (15 * 2**20 // 4) + b"1]"
    for frame in (framed(nested, blob({}, b"")), framed(b"{}", blob(nested))):
        before = time.process_time()
        tracemalloc.start()
        with pytest.raises(FrameError, match="bytes of JSON, expected at most"):
            decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10**6
        assert time.process_time() - before < 1.0


@pytest.mark.parametrize("seed", range(100))
def test_random_json_is_parsed_in_no_time_or_refused(seed):
    """Texts of the characters that steer a parser, at the cap: no pattern of ours goes quadratic on them."""
    choose = random.Random(seed)
    alphabet = [b"[", b"]", b"{", b"}", b'"', b"\\", b",", b":", b"1", b"e", b"\xc3", b" "]
    letters = choose.sample(alphabet, choose.randint(1, 4))
    text = b"".join(choose.choices(letters, k=MOST_TEXT))
    before = time.process_time()
    with pytest.raises(FrameError):
        strict_json(text, "it")
    assert time.process_time() - before < 0.5


def test_json_up_to_the_caps_is_read():
    entries = b"[" + b"1," * (MOST_ENTRIES - 2) + b"1]"
    assert len(strict_json(entries, "it")) == MOST_ENTRIES - 1
    strict_json(deep(b"[]", MOST_DEPTH), "it")
    assert strict_json(b'"' + b"[{," * 20_000 + b'"', "it") == "[{," * 20_000  # words are no structure
    with pytest.raises(FrameError, match=f"{MOST_DEPTH + 1} deep"):
        strict_json(deep(b"[]", MOST_DEPTH + 1), "it")
    with pytest.raises(FrameError, match="entries of JSON"):
        strict_json(b"[" + b"1," * MOST_ENTRIES + b"1]", "it")


# --- whole messages that are no question that can be scored ---


def question(**changes) -> bytes:
    """The frame of a question, some entries changed; an entry that is Ellipsis is left out."""
    good = {"samples": SAMPLES, "cond": LABELS, "table": TABLE} | changes
    return encode({key: value for key, value in good.items() if value is not ...})


def told(**changes) -> dict:
    """The facts of a greeting without metadata, some changed; one that is Ellipsis is left out."""
    plain = {key: value for key, value in FACTS.items() if key != "metadata"}
    known = dict(plain, prompts=packed(FACTS["prompts"]), shape=list(FACTS["shape"])) | changes
    return {key: value for key, value in known.items() if value is not ...}


def value(x: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    changed = SAMPLES.to(dtype).clone()
    changed[3, 0, 1, 2] = x
    return changed


PROMPTS = packed(FACTS["prompts"])
QUESTIONS = {
    "no samples": {"samples": ...},
    "no condition": {"cond": ...},
    "no table": {"table": ...},
    "facts": {"facts": {}},
    "a table that is None": {"table": None},
    "a table that is a list": {"table": [TABLE]},
    "a table that is facts": {"table": {"prompts": []}},
    "a table of words": {"table": "a cat"},
    "half a digest": {"table": TABLE[:32]},
    "a digest and more": {"table": TABLE + "0"},
    "a digest in capitals": {"table": "ABCDEF" + TABLE[6:]},
    "a digest of bytes": {"table": torch.zeros(32, dtype=torch.uint8)},
    "an unknown key": {"seed": 1},
    "samples that are words": {"samples": "a cat"},
    "samples that are a list": {"samples": [1.0]},
    "samples of three dimensions": {"samples": SAMPLES[:, 0]},
    "samples of five dimensions": {"samples": SAMPLES[None]},
    "no sample": {"samples": SAMPLES[:0], "cond": LABELS[:0]},
    "samples without rows": {"samples": SAMPLES[:, :, :0]},
    "samples of bytes": {"samples": (SAMPLES * 255).byte()},
    "samples of integers": {"samples": SAMPLES.long()},
    "other sides": {"samples": SAMPLES[:, :, :3]},
    "other channels": {"samples": SAMPLES.expand(-1, 3, -1, -1)},
    "NaN": {"samples": value(math.nan)},
    "infinity": {"samples": value(math.inf)},
    "minus infinity": {"samples": value(-math.inf)},
    "below 0": {"samples": value(-0.01)},
    "a little below 0": {"samples": value(-0.0011)},
    "above 1": {"samples": value(1.01)},
    "a little above 1": {"samples": value(1.0011)},
    "of [-1, 1]": {"samples": 2 * SAMPLES - 1},
    "of 0 to 255": {"samples": 255 * SAMPLES},
    "above 1, in 16 bits": {"samples": value(1.01, torch.float16)},
    "NaN, in 16 bits": {"samples": value(math.nan, torch.bfloat16)},
    "huge, in 64 bits": {"samples": value(1e300, torch.float64)},
    "too few labels": {"cond": LABELS[:5]},
    "too many labels": {"cond": torch.cat([LABELS, LABELS])},
    "a label": {"cond": torch.tensor(1)},
    "labels that are words": {"cond": "a cat"},
    "labels below 0": {"cond": LABELS - 1},
    "labels of no class": {"cond": LABELS + 1},
    "labels far off": {"cond": LABELS + 2**62},
    "labels of bytes": {"cond": LABELS.byte()},
    "an embedding that is NaN": {"cond": torch.full((6, 5), math.nan)},
    "a dict with a part of another batch": {"cond": {"text": torch.zeros(6, 2), "size": torch.zeros(5)}},
    "a dict with a word": {"cond": {"text": "cat"}},
    "a list of conditions": {"cond": [LABELS]},
}  # fmt: skip


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_cannot_be_scored_is_refused_by_name(name):
    assert "expected" in assert_refused(question(**QUESTIONS[name]), UNSCORABLE)


GREETINGS = {
    "facts that are a list": [],
    "facts that are words": "a cat",
    "facts without prompts": told(prompts=...),
    "facts without a shape": told(shape=...),
    "facts with an unknown key": told(words=["a"]),
    "prompts as a list": told(prompts=["zero", "one", "zwei"]),
    "prompts that are no texts": told(prompts=PROMPTS | {"ends": torch.zeros(3)}),
    "prompts whose ends fall": told(prompts=PROMPTS | {"ends": torch.tensor([7, 4, 11])}),
    "prompts whose ends are below 0": told(prompts=PROMPTS | {"ends": torch.tensor([-1, 4, 11])}),
    "prompts whose ends are behind the end": told(prompts=PROMPTS | {"ends": torch.tensor([4, 7, 2**60])}),
    "prompts that are not UTF-8": told(prompts=PROMPTS | {"utf8": torch.full((11,), 255).byte()}),
    "fewer classes than prompts": told(classes=2),
    "classes that are a fraction": told(classes=3.0),
    "classes that are true": told(classes=True),
    "a shape of two": told(shape=[4, 4]),
    "a shape of 0": told(shape=[1, 4, 0]),
    "a shape below 0": told(shape=[1, -4, -4]),
    "a shape of fractions": told(shape=[1.0, 4.0, 4.0]),
    "a shape of words": told(shape="1x4x4"),
    "a shape of a tensor": told(shape=torch.ones(9, 9)),
    "classes of a tensor": told(classes=torch.ones(9, 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", GREETINGS)
def test_a_greeting_of_odd_facts_is_refused(name):
    assert "expected" in assert_refused(encode({"facts": GREETINGS[name]}), UNSCORABLE, path="/hello")


def test_a_question_of_prompts_that_were_never_said_asks_for_them():
    said = assert_refused(question(table="0" * 64), UNKNOWN)
    assert "prompts of digest 000000000000 are not known here" in said


@pytest.mark.parametrize(
    "changes",
    [
        {"samples": value(1.0005)},
        {"samples": value(-0.0005)},
        {"samples": SAMPLES.bfloat16()},
        {"samples": SAMPLES.half()},
        {"samples": SAMPLES.double()},
        {"cond": None},
        {"cond": LABELS.int()},
        {"cond": torch.randn(6, 5, generator=generator(1))},
        {"cond": {"text": torch.randn(6, 2, 3), "size": torch.full((6,), 99)}},
        {"table": "", "cond": LABELS + 5},
    ],
)
def test_what_honest_askers_send_is_scored(changes):
    status, said = sent(question(**changes))
    assert status == 200, said


def test_a_frame_of_an_older_or_newer_protocol_is_told_so():
    for digit in (b"1", b"2", b"9"):
        said = assert_refused(b"RLF" + digit + QUESTION[4:], MALFORMED)
        assert f"a frame of protocol {digit.decode()}: expected 3, the same rlfusion on both sides" in said


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 415),
        ({"content-type": "text/plain; charset=utf-8"}, 415),
        ({"content-type": "multipart/form-data"}, 415),
        ({"content-type": ""}, 415),
        ({"content-length": "-1"}, 400),
        ({"content-length": "many"}, 400),
        ({"content-length": "1e3"}, 400),
        ({"content-length": "٣"}, 400),
        ({"content-length": "9" * 30}, 400),
        ({"content-length": ""}, 411),
        ({"content-length": str(10**6 + 1)}, 413),
        ({"content-length": "10"}, 413),
        ({"content-type": "application/octet-stream"}, 200),
    ],
)
def test_headers_of_another_kind_are_refused_by_their_status(headers, status):
    headers = {name: text.encode().decode("latin-1") for name, text in headers.items()}
    found, said = sent(QUESTION, headers=headers)
    assert found == status, said


# --- answers ---


def reply(**changes) -> bytes:
    message = Answer(torch.rand(6), {}, IDENTITY).sent(digest_of(QUESTION)) | changes
    return encode({key: value for key, value in message.items() if value is not ...})


def failing(items: list[int], reasons: list[str], values: list[float], raised: torch.Tensor | None = None) -> dict:
    errors = {"items": torch.tensor(items, dtype=torch.int64), "reasons": packed(reasons)}
    errors["raised"] = torch.zeros(len(items), dtype=torch.uint8) if raised is None else raised
    return {"values": torch.tensor(values), "errors": errors}


def of_one(raised: torch.Tensor) -> dict:
    """An answer whose first item failed, because the user's code raised or not."""
    return failing([0], ["why"], [math.nan] + [0.0] * 5, raised)


ANSWERS = {
    "too few values": {"values": torch.rand(5)},
    "too many values": {"values": torch.rand(7)},
    "values of two dimensions": {"values": torch.rand(6, 1)},
    "integers": {"values": torch.arange(6)},
    "values that are a list": {"values": [0.0] * 6},
    "a NaN without a reason": {"values": torch.tensor([math.nan] + [0.0] * 5)},
    "infinity": {"values": torch.tensor([math.inf] + [0.0] * 5)},
    "a reason without a NaN": failing([0], ["why"], [0.0] * 6),
    "a reason for another item": failing([1], ["why"], [math.nan] + [0.0] * 5),
    "a reason twice": failing([0, 0], ["why", "why"], [math.nan] + [0.0] * 5),
    "an item that is not there": failing([0, 9], ["why", "why"], [math.nan] + [0.0] * 5),
    "infinity with a reason": failing([0], ["why"], [math.inf] + [0.0] * 5),
    "raised of another size": of_one(torch.zeros(2, dtype=torch.uint8)),
    "raised of another kind": of_one(torch.zeros(1)),
    "raised above 1": of_one(torch.full((1,), 2, dtype=torch.uint8)),
    "errors that do not say whether the code raised": {
        "values": torch.tensor([math.nan] + [0.0] * 5),
        "errors": {"items": torch.tensor([0]), "reasons": packed(["why"])},
    },
    "errors of another kind": {"errors": {}},
    "errors that are words": {"errors": "none"},
    "no identity": {"identity": ...},
    "an identity of another kind": {"identity": 3},
    "an identity in capitals": {"identity": "A" * 16},
    "another question": {"question": "0" * 64},
    "no question": {"question": ...},
    "an unknown key": {"seed": 1},
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_another_kind_is_refused(name):
    assert answered(reply(), 6, QUESTION).errors == {}
    assert answered(reply(**of_one(torch.ones(1, dtype=torch.uint8))), 6, QUESTION).raised == {0}
    with pytest.raises(FrameError):
        answered(reply(**ANSWERS[name]), 6, QUESTION)


def test_the_reasons_of_many_failures_come_whole():
    """All samples of a large question fail at length: more text than a frame's JSON may have."""
    count = 5000
    frame = ask(torch.zeros(count, 1, 1, 1), None)

    def picky(samples, cond):
        raise ValueError("too dark, " * 60)

    values = torch.full((count,), math.nan)
    sent_back = encode(Answer(values, dict.fromkeys(range(count), "too dark, " * 60), IDENTITY).sent(digest_of(frame)))
    errors = answered(sent_back, count, frame).errors
    assert list(errors) == list(range(count))
    assert errors[17] == ("too dark, " * 60)[:500]
    few = ask(torch.zeros(3, 1, 1, 1), None)
    assert answered(answer(picky, IDENTITY, asked(few)), 3, few).errors[0].startswith("it: ValueError: too dark")


def test_a_million_prompts_travel():
    words = tuple(f"a picture of the number {n}" for n in range(100_000))
    told = task_info(words, (1, 1, 1))
    frame = ask(torch.zeros(2, 1, 1, 1), torch.tensor([0, 99_999]), table_of(told))
    assert len(frame) < 1000
    assert tuple(asked(frame, {table_of(told): greeted(greet(told))}).task_info["prompts"]) == words


# --- over sockets ---


def test_a_question_flipped_on_the_way_is_asked_again_and_an_answer_flipped_is_never_a_score():
    """A relay that flips one bit of the first question, then one of the first answer, and passes the rest."""
    with serving(mean) as url, Relay(url) as relay:
        remote = client(relay.url, patience_s=30.0)
        assert torch.equal(remote(SAMPLES, LABELS), mean(SAMPLES, None))
        for way in ("question", "answer"):
            relay.flip = way
            assert torch.equal(remote(SAMPLES, LABELS), mean(SAMPLES, None))
            assert relay.flip == ""  # it did flip one


class Relay:
    """Passes connections on to a server, and flips the last bit of the next question or answer of /score."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.server, self.flip = (parts.hostname, parts.port), ""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def __enter__(self) -> "Relay":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                asker, _ = self.listener.accept()
            except OSError:
                return
            with asker, socket.create_connection(self.server) as server:
                asked_for = _message(asker)
                server.sendall(self._passed("question", asked_for, asked_for))
                asker.sendall(self._passed("answer", asked_for, _message(server)))

    def _passed(self, way: str, asked_for: bytes, message: bytes) -> bytes:
        if self.flip != way or b"/score" not in asked_for[:100]:
            return message
        self.flip = ""
        return message[:-1] + bytes([message[-1] ^ 1])


def _message(connection: socket.socket) -> bytes:
    """One HTTP message with a content-length, whole."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int((lengths or [b"0"])[0]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def health(url: str, timeout: float = 10.0) -> int:
    import urllib3

    return urllib3.request("GET", f"{url}/health", retries=False, timeout=timeout).status


def connected(url: str) -> socket.socket:
    parts = urlsplit(url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


@pytest.mark.alone
def test_health_answers_beside_clients_that_drip_flood_and_send_heavy_nonsense():
    """More dripping connections as there may be, and frames of many megabytes of JSON at once."""
    heavy = framed(b"[" + b"[]," * 5_000_000 + b"[]]", b"")
    head = f"POST /score HTTP/1.1\r\nHost: it\r\nContent-Length: {len(heavy)}\r\n\r\n".encode()
    with serving(mean, limits=Limits(2**26, 60.0, 2**30)) as url:
        dripping = [connected(url) for _ in range(3 * ASKING)]
        for n, connection in enumerate(dripping):
            with suppress(OSError):  # cut off, to make room for others
                connection.sendall(head + b"x" if n % 20 == 0 else b"POST /score HTTP/1.1\r\nHost: it\r\n")
        floods = [threading.Thread(target=_flood, args=(url, head + heavy), daemon=True) for _ in range(4)]
        for flood in floods:
            flood.start()
        slowest = 0.0
        while any(flood.is_alive() for flood in floods):
            began = time.monotonic()
            assert health(url) == 200
            slowest = max(slowest, time.monotonic() - began)
        for connection in dripping:
            connection.close()
        assert slowest < 5.0
        assert torch.equal(client(url, patience_s=30.0)(SAMPLES, LABELS), mean(SAMPLES, None))


def _flood(url: str, request: bytes) -> None:
    with connected(url) as connection:
        connection.sendall(request)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_who_falls_silent_gives_its_room_back_long_before_the_deadline(monkeypatch):
    from rlfusion.rewards.remote import server as service

    monkeypatch.setattr(service, "STALL_S", 0.2)
    head = f"POST /score HTTP/1.1\r\nHost: it\r\nContent-Length: {len(QUESTION)}\r\n\r\n".encode()
    with serving(mean, limits=Limits(10**6, 600.0, 10**6)) as url, connected(url) as silent:
        silent.sendall(head + QUESTION[:-1])
        assert silent.recv(100).startswith(b"HTTP/1.1 408")


def test_more_questions_at_once_than_a_server_takes_are_asked_again_later():
    inside = Service(Offer("it", {}, (), lambda task_info: mean), "", Limits(10**6, 20.0, 10**7))
    inside._asked = ASKING
    app = application(inside)
    assert sent(QUESTION, app=app) == (503, b"%d questions at once are being answered" % ASKING)
    inside._asked = 0
    assert sent(GREETING, "/hello", app=app)[0] == 200
    assert sent(QUESTION, app=app)[0] == 200
    assert inside._asked == 0


@pytest.mark.alone
def test_the_memory_of_a_server_of_damaged_frames_does_not_grow():
    broken = bytearray(ask(torch.rand(50, 3, 32, 32), None))
    broken[-1] ^= 1
    for _ in range(5):
        sent(bytes(broken))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(40):
        assert sent(bytes(broken))[0] == DAMAGED
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


@pytest.mark.parametrize(
    ("served", "said"),
    [
        (lambda good: encode({"reward": "it", "identity": IDENTITY, "groups": False, "max_bytes": 9, "protocol": 4}),
         "speaks protocol 4: expected 3, the same rlfusion on both sides"),
        (None, r"a frame begins with b'RLF1' \(we speak protocol 3; does another rlfusion serve there\?\)"),
    ],
)  # fmt: skip
def test_a_server_of_another_protocol_is_refused_at_once(served, said):
    with Other(served) as one, pytest.raises(ConfigError, match=said):
        client(one.url, patience_s=60.0)(SAMPLES, LABELS)


class Other(Faulty):
    """A server of another rlfusion: of a later one, or (None) of the first, which knew no digest."""

    def __init__(self, served) -> None:
        super().__init__(mean)
        self.served = served

    def _answer(self, path: str, body: bytes) -> bytes:
        from reward_servers import http

        if self.served is None:
            words = f"FrameError: the bytes begin with {body[:4]!r}: a frame begins with b'RLF1'"
            return http(words.encode(), "400 Bad Request")
        return http(self.served(b""))


def test_the_head_is_as_documented():
    assert (HEAD.size, DIGESTED.size, MAGIC) == (48, 16, b"RLF3")
