"""Remote rewards: the frames, the client's tries, the service; the same bits as at home, and every fault named."""

import asyncio
import math
import re
import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import torch
from reward_servers import FAULTS, IDENTITY, Faulty, client, serving
from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.config import Serve
from rlfusion.nets.classifier import Classifier
from rlfusion.rewards import PairWise, RewardFailure, build, needs_groups, score, task_info
from rlfusion.rewards.remote.budget import Budget
from rlfusion.rewards.remote.client import Remote, Served
from rlfusion.rewards.remote.exchange import answer, answered, ask, asked, greet, greeted, table_of
from rlfusion.rewards.remote.frames import (
    MOST_ENTRIES,
    MOST_TENSORS,
    MOST_TEXT,
    FrameError,
    decode,
    digest_of,
    encode,
    packed,
    unpacked,
)
from rlfusion.rewards.remote.grading import graded
from rlfusion.rewards.remote.offer import Limits, Offer
from rlfusion.rewards.remote.replicas import Replicas
from rlfusion.rewards.remote.secret import VARIABLE, read_token
from rlfusion.rewards.remote.tables import MOST_TABLES, Tables
from rlfusion.rewards.remote.transport import Failed, RefusedError

TOKEN = "a-secret-of-24-characters"
NOT_RAISED = torch.zeros(1, dtype=torch.uint8)


class Net(nn.Module):
    """A reward whose last bits depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Classifier("mlp", (1, 8, 8), 10).eval().requires_grad_(False)

    def forward(self, samples, cond):
        return self.net(samples).log_softmax(1).gather(1, cond[:, None])[:, 0]


@pytest.fixture
def samples():
    return torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def label():
    return torch.arange(24) % 10


# --- frames ---


def test_a_message_comes_back_bit_for_bit():
    x = torch.tensor([0.1, -0.0, math.inf, math.nan, 1e-45])
    message = {"a": x, "b": [1, None, "ü", {3: torch.arange(2), "h": x.bfloat16()}], "c": (), "d": math.nan}
    back = decode(encode(message))
    assert back["a"].numpy().tobytes() == x.numpy().tobytes()
    assert torch.equal(back["b"][3]["h"].view(torch.int16), x.bfloat16().view(torch.int16))
    assert back["b"][:3] == [1, None, "ü"]
    assert list(back["b"][3]) == [3, "h"]
    assert back["c"] == ()
    assert encode(message) == encode(message)


def test_every_truncation_of_a_frame_is_refused():
    frame = encode({"values": torch.arange(3.0), "errors": {1: "why"}})
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length])
    with pytest.raises(FrameError, match="too long"):
        decode(frame + b"\0")


def test_every_flipped_bit_of_a_frame_is_refused():
    frame = encode({"values": torch.arange(3.0), "errors": {1: "why"}})
    for bit in range(8 * len(frame)):
        broken = bytearray(frame)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode(bytes(broken))


def test_much_json_is_not_written_either():
    with pytest.raises(FrameError, match=f"bytes of JSON, expected at most {MOST_TEXT}"):
        encode({"facts": "x" * MOST_TEXT})
    with pytest.raises(FrameError, match="entries of JSON, expected at most"):
        encode({"facts": [1] * MOST_ENTRIES})
    with pytest.raises(FrameError, match=f"tensors: a frame has at most {MOST_TENSORS}"):
        encode([torch.zeros(1)] * (MOST_TENSORS + 1))


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "ü 漢", "\x00"], ["same"] * 100_000])
def test_texts_come_back_as_they_were(texts):
    assert unpacked(decode(encode(packed(texts))), "they") == texts


# --- question and answer ---


@pytest.mark.parametrize(
    "message",
    [
        {"samples": torch.zeros(2, 8, 8), "cond": None, "table": ""},
        {"samples": torch.zeros(0, 1, 8, 8), "cond": None, "table": ""},
        {"samples": torch.zeros(2, 1, 8, 8, dtype=torch.int64), "cond": None, "table": ""},
        {"samples": torch.zeros(2, 1, 8, 8), "cond": torch.zeros(3), "table": ""},
        {"samples": torch.zeros(2, 1, 8, 8), "cond": "a cat", "table": ""},
        {"samples": torch.zeros(2, 1, 8, 8), "cond": None, "table": []},
        {"samples": torch.zeros(2, 1, 8, 8), "cond": None},
        [],
    ],
)
def test_what_is_no_question_is_refused(message):
    with pytest.raises(FrameError):
        asked(encode(message))


def test_a_question_comes_back_whole(samples):
    cond = {"text": torch.rand(24, 5), "size": torch.arange(24)}
    told = task_info(("a", "b"), (1, 8, 8))
    question = asked(ask(samples, cond, table_of(told)), {table_of(told): greeted(greet(told))})
    assert torch.equal(question.samples, samples)
    assert torch.equal(question.cond["text"], cond["text"])
    assert question.task_info == {"prompts": ["a", "b"], "shape": [1, 8, 8], "classes": 2, "metadata": [{}, {}]}


def test_a_reward_is_made_once_for_each_model_that_it_tells_apart():
    made = []
    offer = Offer("it", {}, ("prompts", "metadata", "shape"), lambda told: made.append(told) or Net())
    cats, dogs = ("a cat", "a cat"), ("a dog", "a dog")
    models = [
        task_info(cats, (1, 8, 8)),
        task_info(dogs, (1, 8, 8)),
        task_info(cats, (1, 8, 8), [{"k": 1}, {"k": 2}]),
        task_info(cats, (1, 8, 8), [{"k": 2}, {"k": 1}]),
    ]
    for number, known in enumerate(models, 1):
        for table in ("", table_of(known), table_of(known)):
            offer.reward(known, table)
        assert len(made) == number
    offer.reward(models[0] | {"classes": 3})  # which it does not ask for
    assert len(made) == len(models)


def test_the_identity_of_a_reward_is_that_of_its_name_its_options_and_its_weights():
    other = Net()
    next(other.parameters()).data.add_(1)
    offers = [("it", {}, Net()), ("that", {}, Net()), ("it", {"k": 1}, Net()), ("it", {}, other), ("it", {}, Net())]
    seen = [Offer(name, options, (), lambda told, net=net: net).reward({})[1] for name, options, net in offers]
    assert seen[0] == seen[-1]
    assert len(set(seen)) == len(seen) - 1


def test_one_broken_sample_costs_no_other_its_value(samples):
    def picky(x, cond):
        if bool((x.mean((1, 2, 3)) > limit).any()):
            raise ValueError("too bright")
        return x.mean((1, 2, 3)) + cond

    means, cond = samples.mean((1, 2, 3)), torch.arange(24)
    limit = means.topk(2).values[1] - 1e-6
    values, reasons, raised = graded(picky, samples, cond)
    bad = set(means.topk(2).indices.tolist())
    assert set(reasons) == raised == bad
    (why,) = set(reasons.values())
    assert re.fullmatch(r"it: ValueError: too bright \(.*test_remote_rewards\.py, line \d+, in picky\)", why)
    good = [i for i in range(24) if i not in bad]
    torch.testing.assert_close(values[good], (means + cond)[good])
    assert values[list(bad)].isnan().all()


@pytest.mark.parametrize(
    ("given", "reasons"),
    [
        (torch.tensor([1.0, math.nan, math.inf]), {1: "answered nan", 2: "answered inf"}),
        (torch.zeros(2), dict.fromkeys(range(3), "RewardError: reward 'it' answered shape (2,): expected (3,)")),
        (None, dict.fromkeys(range(3), "RewardError: reward 'it' answered NoneType: expected a tensor of shape (3,)")),
    ],
)
def test_what_is_no_number_is_an_error_of_its_item(given, reasons, samples):
    values, found, raised = graded(lambda x, c: given, samples[:3], None)
    assert found == reasons
    assert not raised
    assert values.isnan().tolist() == [i in reasons for i in range(3)]


def test_an_answer_that_hides_a_failure_or_is_to_another_question_is_refused(samples):
    question = ask(samples, None)
    frame = answer(lambda x, c: x.mean((1, 2, 3)), IDENTITY, asked(question))
    assert answered(frame, 24, question).identity == IDENTITY
    good = decode(frame)
    errors = {"items": torch.tensor([2]), "reasons": packed(["why"]), "raised": NOT_RAISED}
    for wrong in ({"errors": errors}, {"values": good["values"] + math.nan}, {"values": good["values"][:3]}):
        with pytest.raises(FrameError):
            answered(encode(good | wrong), 24, question)
    with pytest.raises(FrameError, match="the answer is to another question"):
        answered(frame, 24, ask(samples.flip(0), None))


# --- which replica, when: no clock, no sockets ---


def test_replicas_rest_longer_with_each_failure_and_the_rested_are_asked_first():
    three = Replicas(["a", "b", "c"], first_s=1.0, longest_s=3.0)
    assert [three.next(first, 0.0) for first in range(4)] == [("a", 0), ("b", 0), ("c", 0), ("a", 0)]
    three.failed("b", "refused", 0.0)
    assert three.next(1, 0.5) == ("c", 0)  # b rests until 1
    assert three.next(1, 1.0) == ("b", 0)
    three.failed("b", "refused", 1.0)
    assert three.next(1, 2.9) == ("c", 0)  # until 3
    assert three.next(1, 3.0) == ("b", 0)
    for _ in range(2000):
        three.failed("b", "late", 3.0)
    assert three.next(1, 5.9) == ("c", 0)
    assert three.next(1, 6.0) == ("b", 0)  # never longer than 3
    for url in ("a", "c"):
        three.failed(url, "gone", 5.8)
    assert three.next(1, 5.9) == ("b", pytest.approx(0.1))
    assert three.reasons == "a: gone; b: late; c: gone"
    three.answered("b")
    assert three.next(1, 5.9) == ("b", 0)
    assert not three.failing("b")


# --- the same bits as at home ---


def test_a_served_network_gives_the_bits_of_the_local_one(samples, label):
    net = Net()
    with serving(net) as url:
        assert torch.equal(client(url)(samples, label), net(samples, label))
        parts = torch.cat([net(samples[i : i + 7], label[i : i + 7]) for i in range(0, 24, 7)])
        assert torch.equal(client(url, batch=7)(samples, label), parts)
        assert not client(url)(samples.requires_grad_(), label).requires_grad


def test_the_name_of_a_server_is_the_name_of_a_reward(samples, label):
    net = Net()
    with serving(net) as url:
        total = build({url: 2.0, "ink": 1.0}, {url: {"timeout_s": 30.0}}, task_info("abcdefghij", (1, 8, 8)))
        assert torch.equal(total(samples, label), 2.0 * net(samples, label) + samples.mean((1, 2, 3)))
    with pytest.raises(ConfigError, match=r"'timeout': .*did you mean 'timeout_s'"):
        build(url, {url: {"timeout": 3}})
    odd = ("http://a:b", "http://a:99999", "http://a:0", "http://[::1", "http://a b:1", "http://a:1/#b")
    for wrong in ("http://", "http://me:secret@host:1", "http://a:1,ftp://b", *odd):
        with pytest.raises(ConfigError, match="expected http://host:port"):
            build(wrong)


def test_the_words_of_the_prompts_reach_the_server(samples):
    made = []

    def make(known):
        made.append(known)
        lengths = torch.tensor([float(len(p)) for p in known["prompts"]])
        return lambda x, cond: lengths[cond]

    cond = torch.arange(24) % 2
    with serving(None, wants={"prompts"}, make=make) as url:
        for shape in ((1, 8, 8), (1, 8, 8), (3, 8, 8)):
            told = task_info(("one", "fifteen"), shape)
            pictures = samples.expand(-1, *shape)
            assert client(url, **told)(pictures, cond).tolist() == [3.0, 7.0] * 12
        assert client(url, **task_info(("a", "bc"), (1, 8, 8)))(samples, cond).tolist() == [1.0, 2.0] * 12
    assert made == [{"prompts": ("one", "fifteen")}, {"prompts": ("a", "bc")}]


# --- prompts: said once ---


MANY = task_info(tuple(f"prompt {n}" for n in range(2000)), (1, 8, 8), tuple({"n": n} for n in range(2000)))


def by_metadata(known):
    numbers = torch.tensor([float(m["n"]) for m in known["metadata"]])
    return lambda x, cond: numbers[cond]


@contextmanager
def remembered(*urls: str):
    """A client for ``MANY``, whose requests are noted: (path, bytes, status)."""
    asker, seen, plain = client(*urls, **MANY), [], Remote._request

    def noted(self, method, url, body, most, timeout_s):
        try:
            found, status = plain(self, method, url, body, most, timeout_s), 200
        except RefusedError as error:
            status = error.status
            raise
        finally:
            seen.append((url.rpartition("/")[2], len(body or b""), status))
        return found

    asker._request = noted.__get__(asker)
    yield asker, seen


def test_prompts_travel_once_and_questions_name_them(samples):
    cond = torch.arange(24) * 80
    with serving(None, wants={"metadata"}, make=by_metadata) as url, remembered(url) as (asker, seen):
        for _ in range(3):
            assert asker(samples, cond).tolist() == cond.tolist()
    assert [path for path, *_ in seen] == ["hello", "score", "score", "score"]
    assert seen[0][1] > 30_000
    assert max(size for path, size, _ in seen if path == "score") < samples.numel() * 4 + 2000


@pytest.mark.parametrize("how", ["started anew", "let go"])
def test_a_server_that_does_not_know_the_prompts_is_greeted_again(samples, how):
    cond, inside = torch.arange(24) * 80, []
    with (
        serving(None, wants={"metadata"}, make=by_metadata, made=inside.append) as url,
        remembered(url) as (asker, seen),
    ):
        asker(samples, cond)
        if how == "started anew":
            inside[0]._tables, inside[0].offer._kept, inside[0].offer._keys = Tables(), OrderedDict(), OrderedDict()
        else:
            for n in range(MOST_TABLES):
                inside[0]._tables.take(f"{n:064d}", {}, 1)
        assert asker(samples, cond).tolist() == cond.tolist()
    assert [(path, status) for path, _, status in seen] == [
        *[("hello", 200), ("score", 200), ("score", 428), ("hello", 200), ("score", 200)]
    ]


def test_a_server_that_comes_back_at_its_address_is_greeted_again(samples):
    cond, url = torch.arange(24) * 80, ""
    for _ in range(2):
        port = urlsplit(url).port if url else 0
        with serving(None, wants={"metadata"}, make=by_metadata, port=port) as address:
            asker = asker if url else client(address, patience_s=20.0, **MANY)  # noqa: F821
            url = address
            assert asker(samples, cond).tolist() == cond.tolist()


def test_a_server_that_always_forgets_is_named(samples):
    class Forgetful(Tables):
        def take(self, digest, task_info, size):
            return

    def forget(service):
        service._tables = Forgetful()

    with (
        serving(None, wants={"metadata"}, make=by_metadata, made=forget) as url,
        pytest.raises(RewardFailure, match="it was greeted, and forgot"),
    ):
        client(url, **MANY)(samples, torch.arange(24))


def test_tables_are_bounded_and_the_newest_stays():
    tables = Tables(most=100)
    for n in range(3):
        tables.take(str(n), {"n": n}, 40)
    assert len(tables) == 2
    assert tables["1"] == {"n": 1}  # which makes "2" the oldest
    tables.take("3", {"n": 3}, 40)
    with pytest.raises(KeyError):
        tables["2"]
    tables.take("large", {"n": 4}, 1000)
    assert (len(tables), tables["large"]) == (1, {"n": 4})


# --- faults ---


LATE = ("hang", "dripping headers", "dripping body")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_tried_again_and_leaves_no_trace(fault, samples, label):
    net = Net()
    timeout = 0.5 if fault in LATE else 20.0
    with Faulty(net, FAULTS[fault]) as one:
        remote = client(one.url, timeout_s=timeout, patience_s=60.0)
        assert torch.equal(remote(samples, label), net(samples, label))
        assert one.questions == 2


REASONS = {
    "hang": "timed out: no whole answer within 0.5 s",
    "dripping headers": "timed out: no whole answer within 0.5 s",
    "dripping body": "timed out: no whole answer within 0.5 s",
    "connection reset": "ConnectionReset",
    "HTTP 408": "HTTP 408 late",
    "HTTP 429": "HTTP 429 too many",
    "HTTP 500": "HTTP 500 out of memory",
    "HTTP 503": "HTTP 503 busy",
    "garbage": "it answered nonsense: 1024 bytes that begin with",
    "empty": "it answered nonsense: 0 bytes",
    "truncated frame": "it answered nonsense: the frame is truncated",
    "truncated body": "IncompleteRead",
    "too long a frame": "it answered nonsense: the frame is too long",
    "oversized": r"it answered more than \d+ bytes",
    "a head that lies": "it answered nonsense: the frame is truncated",
    "no JSON": "it answered nonsense: the message is no JSON",
    "another message": "it answered nonsense: expected a message of values, errors, identity, question: got hello",
    "values missing": r"it answered nonsense: values of a NoneType: expected values \(24,\)",
    "another question": "it answered nonsense: the answer is to another question",
    "a flipped bit": "it answered nonsense: the frame is damaged: its digest is not that of its bytes",
    "the question was damaged": "HTTP 412 DamagedFrame: the frame is damaged",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_named(fault, samples, label):
    with Faulty(Net(), FAULTS[fault], always=True) as one:
        remote = client(one.url, timeout_s=0.5 if fault in LATE else 20.0)
        said = rf"no server answered within patience_s = 0 \({one.url}: .*{REASONS.get(fault, '')}"
        with pytest.raises(RewardFailure, match=said) as caught:
            score(remote, samples, label, "it")
        assert len(caught.value.reasons) == 24
        assert (caught.value.exit_code, caught.value.kind) == (69, "unavailable")
        assert score(remote, samples, label, "it", masked=True).isnan().all()


def test_a_wait_for_servers_is_said_once_an_outage(samples, label, caplog):
    with Faulty(Net(), FAULTS["HTTP 503"], always=True) as one:
        remote = client(one.url, timeout_s=20.0, patience_s=1.0)
        with pytest.raises(RewardFailure):
            score(remote, samples, label, "it")
    (said,) = [record.getMessage() for record in caplog.records if "no server answers" in record.getMessage()]
    assert (
        said
        == f"reward '{one.url}': no server answers ({one.url}: HTTP 503 busy); asked again for up to patience_s = 1 s"
    )


def test_a_server_that_is_not_there_is_named(samples, label):
    with serving(Net()) as url:
        pass
    with pytest.raises(RewardFailure, match="ConnectionRefused"):
        client(url)(samples, label)


def test_the_other_replica_answers_whichever_fails(samples, label):
    net = Net()
    expected = net(samples, label)
    for always in (False, True):
        with Faulty(net, FAULTS["HTTP 500"], always=always) as bad, Faulty(net) as good:
            for urls in ((bad.url, good.url), (good.url, bad.url)):
                assert torch.equal(client(*urls)(samples, label), expected)
                parts = torch.cat([net(samples[i : i + 2], label[i : i + 2]) for i in range(0, 24, 2)])
                assert torch.equal(client(*urls, batch=2)(samples, label), parts)
            assert bad.questions > 0
            assert good.questions > 0


@pytest.mark.parametrize("status", ["302 Found\r\nLocation: http://127.0.0.1:1/", "400 Bad Request", "404 Not Found"])
def test_what_is_the_asker_s_fault_is_not_tried_again(status, samples, label):
    with Faulty(Net(), lambda good: f"HTTP/1.1 {status}\r\n\r\n".encode()) as one:
        with pytest.raises(ConfigError, match=f"refuses: HTTP {status[:3]}"):
            client(one.url, patience_s=60.0)(samples, label)
        assert one.questions == 1


@pytest.mark.parametrize("given", ["", "another-secret-of-28-letters", TOKEN[:-1] + "x", TOKEN + "s"])
def test_a_wrong_token_is_refused_and_nothing_is_scored(given, samples, label, tmp_path, monkeypatch):
    asked_for = []
    with serving(lambda x, c: asked_for.append(1) or x.mean((1, 2, 3)), token=TOKEN) as url:
        monkeypatch.setenv(VARIABLE, given)
        with pytest.raises(ConfigError, match="refuses: HTTP 401 the token is wrong or missing"):
            client(url, patience_s=60.0)(samples, label)
        assert not asked_for
        monkeypatch.setenv(VARIABLE, TOKEN)
        assert client(url)(samples, label).shape == (24,)


def test_tokens_come_from_private_files_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="its mode is 644, expected 600"):
        read_token(str(file))
    file.chmod(0o600)
    assert read_token(str(file)) == TOKEN
    assert read_token("") == ""
    file.write_text("short")
    with pytest.raises(ConfigError, match="16 printable"):
        read_token(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(str(tmp_path / "absent"))


def test_others_than_the_loopback_need_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="need a token"):
            Serve("ink", host=host)
    for host in ("127.0.0.1", "localhost", "::1"):
        Serve("ink", host=host)
    monkeypatch.setenv(VARIABLE, TOKEN)
    Serve("ink", host="0.0.0.0")


def test_a_question_above_the_size_cap_is_not_sent_and_not_read(samples, label):
    import urllib3

    with serving(Net(), limits=Limits(max_bytes=5000)) as url:
        with pytest.raises(ConfigError, match=r"takes questions of 5000 bytes: 24 samples are \d+"):
            client(url)(samples, label)
        assert torch.equal(client(url, batch=4)(samples[:4], label[:4]), Net()(samples[:4], label[:4]))
        pieces = (b"x" * 1000 for _ in range(20))  # no length said
        answer = urllib3.request("POST", f"{url}/score", body=pieces, retries=False)
        assert (answer.status, answer.data) == (411, b"a request without content-length: expected one")
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as liar:  # room is taken as it is said
            head = b"POST /score HTTP/1.1\r\nHost: it\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
            liar.sendall(head + b"2\r\nxx\r\n0\r\n\r\n")
            assert liar.recv(100).startswith(b"HTTP/1.1 413")


def test_room_is_given_in_order_and_never_more_than_there_is():
    async def asks():
        room, taken = Budget(10), []

        async def hold(name, count):
            await room.take(count)
            taken.append(name)

        tasks = [asyncio.create_task(hold(*one)) for one in (("a", 6), ("b", 5), ("c", 4), ("d", 1))]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (taken, room.free) == (["a"], 4)  # c would fit, and waits behind b
        tasks[1].cancel()
        await asyncio.wait(tasks[1:3])
        assert (taken, room.free) == (["a", "c"], 0)
        room.give(6)
        await tasks[3]
        assert (taken, room.free) == (["a", "c", "d"], 5)
        late = asyncio.create_task(hold("e", 10))
        await asyncio.sleep(0)
        room.give(5)
        late.cancel()  # just as its turn has come
        await asyncio.wait([late])
        assert (taken[3:], room.free) == ([], 10)

    asyncio.run(asks())
    with pytest.raises(ConfigError, match="max_held_mb = 255: expected max_mb = 256"):
        Serve("ink", max_held_mb=255)
    with pytest.raises(ConfigError, match="max_held = 9: expected 10"):
        Limits(max_bytes=10, max_held=9)


@contextmanager
def holding(url: str, count: int):
    """A question of ``count`` bytes whose last one never comes."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as held:
        head = f"POST /score HTTP/1.1\r\nHost: it\r\nContent-Length: {count}\r\n\r\n"
        held.sendall(head.encode() + b"x" * (count - 1))
        yield held


def test_questions_beyond_the_room_of_all_wait_unread_and_are_answered_in_the_end(samples, label):
    """Eight askers where there is room for two questions."""
    most, seen, services, net = len(ask(samples, label)), [], [], Net()

    def watched(x, c):
        seen.append(services[0]._budget.free)
        return net(x, c)

    with serving(watched, limits=Limits(most, 120.0, 2 * most), made=services.append) as url:
        wanted = net(samples, label)
        with ThreadPoolExecutor(8) as several:
            for value in several.map(lambda _: client(url)(samples, label), range(8)):
                assert torch.equal(value, wanted)
        assert min(seen) >= 0
        assert max(seen) <= most  # while at least one is held
        assert services[0]._budget.free == 2 * most


def test_who_drips_gives_its_room_back_and_where_there_is_none_that_is_said(samples, label):
    services, net = [], Net()
    with serving(net, limits=Limits(10**6, 0.3, 10**6), made=services.append) as url:
        room = services[0]._budget
        with holding(url, 10**6) as asker:
            assert asker.recv(100).startswith(b"HTTP/1.1 408")
        assert torch.equal(client(url)(samples, label), net(samples, label))
        room.free = 0
        with pytest.raises(RewardFailure, match=r"HTTP 503 no room for \d+ bytes among 1000000 of other questions"):
            client(url)(samples, label)


def test_a_question_that_hangs_keeps_its_room_until_it_is_done(samples, label):
    goes_on, services = threading.Event(), []
    with serving(
        lambda x, c: goes_on.wait(60) and x.mean((1, 2, 3)), limits=Limits(10**6, 0.3, 10**6), made=services.append
    ) as url:
        with pytest.raises(RewardFailure, match="HTTP 504"):
            client(url)(samples, label)
        assert services[0]._budget.free < 10**6
        goes_on.set()
        while services[0]._budget.free < 10**6:
            time.sleep(0.01)


def test_an_asker_that_drips_its_headers_is_cut_off(samples, label):
    with serving(Net(), limits=Limits(deadline_s=0.3)) as url:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=20) as dripping:
            dripping.sendall(b"POST /score HTTP/1.1\r\nHost: it\r\n")
            dripping.settimeout(0.05)
            for _ in range(400):
                try:
                    dripping.sendall(b"a")
                    if dripping.recv(1) == b"":
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            else:
                pytest.fail("it may drip for ever")
        assert torch.equal(client(url)(samples, label), Net()(samples, label))


def test_an_answer_of_odd_errors_or_a_server_of_odd_words_is_no_answer():
    question = ask(torch.zeros(2, 1, 2, 2), None)
    errors = {"items": torch.tensor([0]), "reasons": packed(["why"]), "raised": NOT_RAISED}
    good = {"values": torch.tensor([math.nan, 1.0]), "errors": errors, "identity": IDENTITY}
    good["question"] = digest_of(question)
    assert answered(encode(good), 2, question).errors == {0: "why"}
    for items, reasons in (([0, 1], ["a", "b"]), ([1], ["a"]), ([0, 0], ["a", "b"]), ([0], ["a", "b"])):
        raised = torch.zeros(len(items), dtype=torch.uint8)
        errors = {"items": torch.tensor(items), "reasons": packed(reasons), "raised": raised}
        with pytest.raises(FrameError, match="errors"):
            answered(encode(good | {"errors": errors}), 2, question)
    told = {"reward": "it", "identity": IDENTITY, "groups": False, "max_bytes": 10**6}
    assert Served.read(encode(told)).max_bytes == 10**6
    for wrong in ({"max_bytes": "many"}, {"groups": "no"}, {"identity": None}, {"protocol": 1.0}):
        with pytest.raises(Failed, match=f"it is no reward server: {next(iter(wrong))} = "):
            Served.read(encode(told | wrong))


@pytest.mark.parametrize(
    ("body", "status"), [(b"", 400), (b"garbage", 400), (encode({"samples": None, "cond": None, "table": ""}), 422)]
)
def test_the_service_refuses_what_is_no_question(body, status):
    import urllib3

    with serving(Net()) as url:
        for path in ("/score", "/hello"):
            assert urllib3.request("POST", f"{url}{path}", body=body, retries=False).status == status
        assert urllib3.request("GET", f"{url}/elsewhere", retries=False).status == 404
        assert urllib3.request("GET", f"{url}/health", retries=False).json() == {"alive": True, "reward": "it"}


def test_a_reward_that_hangs_on_the_server_is_named_and_another_replica_answers(samples, label):
    net, goes_on = Net(), threading.Event()

    def stuck(x, c):
        goes_on.wait(60)
        return net(x, c)

    with serving(stuck, limits=Limits(deadline_s=0.3)) as bad, serving(net) as good:
        try:
            with pytest.raises(RewardFailure, match=r"HTTP 504 no score from 'it' in 0.3 s"):
                client(bad)(samples, label)
            while time.monotonic() and not _busy(bad):
                pass
            with pytest.raises(RewardFailure, match="HTTP 503 reward 'it' hangs"):
                client(bad)(samples, label)
            assert torch.equal(client(bad, good)(samples, label), net(samples, label))
        finally:
            goes_on.set()


def _busy(url: str) -> bool:
    import urllib3

    return urllib3.request("GET", f"{url}/health", retries=False).status == 503


def test_replicas_of_different_rewards_are_refused(samples, label):
    said = r"serves a reward of identity \w{16}: expected \w{16}, as http"
    mean = Net()
    with serving(mean, name="a") as a, serving(mean, name="b") as b, pytest.raises(ConfigError, match=said):
        client(a, b, batch=1)(samples, label)


def test_a_server_that_comes_back_with_another_reward_is_refused(samples, label):
    with Faulty(Net()) as one:
        remote = client(one.url)
        remote(samples, label)
        one.faults.append(lambda good: _http_with_identity(good, "1" * 16))
        with pytest.raises(ConfigError, match=f"identity {'1' * 16}: expected {IDENTITY}"):
            remote(samples, label)


def _http_with_identity(good: bytes, identity: str) -> bytes:
    from reward_servers import http

    return http(encode(decode(good) | {"identity": identity}))


def test_what_the_server_cannot_score_is_an_error_of_its_item(samples, label):
    def picky(x, c):
        return x.mean((1, 2, 3)).masked_fill(c == 3, math.nan)

    with serving(picky) as url:
        for settings in ({}, {"batch": 5}):
            with pytest.raises(RewardFailure, match=r"3 of 24 samples: item 3: answered nan; .* item 23") as caught:
                score(client(url, **settings), samples, label, "it")
            assert caught.value.exit_code == 4
            masked = score(client(url, **settings), samples, label, "it", masked=True)
            assert masked.isnan().tolist() == (label == 3).tolist()


def test_the_client_knows_that_the_served_reward_compares_whole_groups(samples, label):
    pairs = PairWise(lambda a, b, c: (a.mean((1, 2, 3)) > b.mean((1, 2, 3))).float())
    with serving(pairs) as url, serving(Net()) as plain:
        assert needs_groups(client(url))
        assert not needs_groups(client(plain))
        cond = torch.arange(24) // 6
        assert torch.equal(client(url)(samples, cond), pairs(samples, cond))
        with pytest.raises(ConfigError, match=r"batch = 6: .* compares whole groups"):
            client(url, batch=6)(samples, cond)


def test_a_server_that_ends_does_not_wait_for_what_it_receives_or_scores(samples, label, caplog):
    begun, goes_on, net = threading.Event(), threading.Event(), Net()

    def slow(x, c):
        begun.set()
        goes_on.wait(60)
        return net(x, c)

    with ThreadPoolExecutor() as pool:
        try:
            with serving(slow) as url, socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as half:
                half.sendall(b"POST /score HTTP/1.1\r\nHost: it\r\nContent-Length: 100\r\n\r\nRLF")
                asked = pool.submit(client(url), samples, label)
                assert begun.wait(20)
                end = time.monotonic()
            assert time.monotonic() - end < 4  # on a busy machine
            with pytest.raises(RewardFailure, match="HTTP 503 the server ends"):
                asked.result(20)
        finally:
            goes_on.set()
    assert not [record for record in caplog.records if record.exc_info]
