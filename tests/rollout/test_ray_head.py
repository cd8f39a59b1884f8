"""What becomes of a process whose Ray node or head is gone, with sockets in their places."""

import itertools
import socket
import threading
import time
import types
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

pytest.importorskip("ray")

from rlfusion.common import stops
from rlfusion.rollout import ray_head
from rlfusion.rollout.ray_head import Needed, watched


@pytest.fixture
def held(tmp_path) -> Iterator[tuple[Needed, socket.socket, ExitStack]]:
    """What is needed, the listener of the head, and what ends the store."""
    with ExitStack() as stack:
        store = stack.enter_context(ExitStack())
        listener = store.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(tmp_path / "store"))
        listener.listen()
        head = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        yield Needed(head.getsockname(), str(tmp_path / "store")), head, store


def told(seconds: float, said: list[str]) -> str:
    deadline = time.monotonic() + seconds
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    return said[0] if said else ""


def test_nothing_is_said_while_both_are_there_and_the_watch_ends_with_them(held, monkeypatch):
    monkeypatch.setattr(ray_head, "LOOK_S", 0.02)
    said: list[str] = []
    with watched(held[0], said.append):
        assert told(0.5, said) == ""
    assert not [thread for thread in threading.enumerate() if thread.name == "rlfusion-head"]


def test_the_watch_ends_at_once(held, monkeypatch):
    monkeypatch.setattr(ray_head, "LOOK_S", 600.0)
    with watched(held[0], print):
        began = time.monotonic()
    assert time.monotonic() - began < 60


def test_a_raylet_that_ends_is_seen_at_once(held, monkeypatch):
    monkeypatch.setattr(ray_head, "LOOK_S", 600.0)
    said: list[str] = []
    with watched(held[0], said.append):
        assert told(0.2, said) == ""
        held[2].close()
        assert told(30.0, said) == "the Ray node of this process is gone: its raylet has ended"


def test_a_head_where_nothing_listens_is_given_up(held, monkeypatch):
    monkeypatch.setattr(ray_head, "LOOK_S", 0.02)
    monkeypatch.setattr(ray_head, "GONE_S", 0.4)
    said: list[str] = []
    needed, head, _ = held
    head.close()
    with watched(needed, said.append):
        line = told(30.0, said)
    host, port = needed.head
    assert line == f"the head of the Ray cluster is gone: nothing listens at {host}:{port} for 0.4 s"


@pytest.mark.parametrize(("answers", "gone"), [("...x" * 3, False), ("....", True), ("x..x....", True)])
def test_a_head_is_given_up_once_its_time_is_over_and_one_that_answers_again_has_all_of_it(
    answers, gone, held, monkeypatch
):
    """Of four looks, 0.1 s apart, the last is at 0.4 s; "x" is one that is answered."""
    looks, clock, over = iter(answers), itertools.count(), threading.Event()

    def listens(_: object) -> bool:
        look = next(looks, "")
        if not look:
            over.set()
        return look != "."

    monkeypatch.setattr(ray_head, "LOOK_S", 0.01)
    monkeypatch.setattr(ray_head, "GONE_S", 0.35)
    monkeypatch.setattr(ray_head, "listens", listens)
    monkeypatch.setattr(ray_head, "time", types.SimpleNamespace(monotonic=lambda: next(clock) * 0.1))
    said: list[str] = []
    with watched(held[0], said.append):
        if gone:
            assert told(30.0, said)
        else:
            assert over.wait(30.0)
    assert len(said) == gone


def test_a_client_of_a_client_server_looks_at_that_alone():
    assert ray_head.needed("ray://[::1]:10001") == Needed(("::1", 10001), "")


def test_a_command_ends_with_one_line_and_what_is_left(monkeypatch, capfd):
    ended: list[int] = []
    monkeypatch.setattr(stops.os, "_exit", ended.append)
    monkeypatch.setattr(stops.Entry, "current", stops.Entry())
    with stops.leaving(lambda saved: f"go on with: {saved}"):
        ray_head._end("it is gone")
    assert ended == [69]
    assert capfd.readouterr().err == "rlfusion: unavailable: it is gone; go on with: False\n"


def test_a_program_of_somebody_else_is_not_ended(monkeypatch, caplog):
    monkeypatch.setattr(stops.Entry, "current", None)
    ray_head._end("it is gone")
    assert "it is gone" in caplog.text
