"""What is fetched from the hub: from a server that answers; and where none can be reached, an answer within seconds."""

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlfusion.common import hub
from rlfusion.common.errors import ConfigError
from rlfusion.data import load
from rlfusion.models import pipelines
from rlfusion.rewards import build
from rlfusion.rewards.clip.checkpoints import local_file

huggingface_hub = pytest.importorskip("huggingface_hub")
from hubs import begin_anew  # noqa: E402
from huggingface_hub import constants  # noqa: E402

CONTENT = b"weights"
AT_ONCE_S = 6.0


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No hub was tried, the cache is empty, and nothing says that we are offline."""
    begin_anew(monkeypatch, tmp_path / "cache")


@pytest.fixture
def at(monkeypatch) -> Callable[[str], None]:
    """``at(address)``: the hub is there."""

    def move(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )

    return move


class Hub(BaseHTTPRequestHandler):
    """One file of one repository, as the hub answers for it."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()
        self.wfile.write(CONTENT)

    def answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.send_header("ETag", f'"{hashlib.sha256(CONTENT).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()

    def log_message(self, *about: object) -> None:
        pass


@contextlib.contextmanager
def served() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def nowhere() -> str:
    """An address at which nothing listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}"


def test_a_file_is_fetched_and_read_from_the_cache_without_the_hub(at, monkeypatch, caplog):
    with served() as address:
        at(address)
        assert local_file("hf-hub:me/it/a.bin", "head").read_bytes() == CONTENT
    assert (hub.unreachable(), caplog.messages) == ("", [])
    monkeypatch.setattr(hub, "_tried", {})
    begin = time.monotonic()
    assert local_file("hf-hub:me/it/a.bin", "head").read_bytes() == CONTENT
    assert time.monotonic() - begin < AT_ONCE_S
    assert "cannot be reached" in caplog.messages[0]
    assert not constants.HF_HUB_OFFLINE


FETCHED = {
    "a file": lambda: local_file("hf-hub:me/it/a.bin", "head"),
    "a reward": lambda: build("aesthetic"),
    "a model": lambda: pipelines.hub.folder("me/it"),
    "data": lambda: load("hf(path='me/it')", 8),
    "a CLIP": lambda: build(
        "clip_score", {"clip_score": {"model": "ViT-B-32", "checkpoint": "openai"}}, {"prompts": ("a",)}
    ),
    "a CLIP by its address": lambda: build("hps_v2", {}, {"prompts": ("a",)}),
}


@pytest.mark.parametrize("what", FETCHED)
def test_a_hub_that_cannot_be_reached_is_said_at_once(what, at, monkeypatch, caplog):
    address, slept = nowhere(), []
    at(address)
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(ConfigError) as caught:
        FETCHED[what]()
    assert sum(slept) < 1, "it was tried again"
    said = f"{address.removeprefix('http://')} cannot be reached ("
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caplog.messages[0].startswith(said)
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_not_waited_for(at, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.3")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(ConfigError, match=r"cannot be reached \((no answer within 0.3 s|.*timed out.*)\)"):
            local_file("hf-hub:me/it/a.bin", "head")
        assert time.monotonic() - begin < 3


def test_a_hub_is_tried_once_and_after_a_while_again(at, monkeypatch):
    tried = []
    monkeypatch.setattr(hub, "_try", lambda address: tried.append(address) or "down")
    for _ in range(3):
        with hub.fetching(), hub.fetching():
            assert constants.HF_HUB_OFFLINE
            assert hub.unreachable() == "down"
        assert not constants.HF_HUB_OFFLINE
    assert len(tried) == 1
    monkeypatch.setattr(hub, "AGAIN_S", 0.0)
    monkeypatch.setattr(hub, "_try", lambda address: "")
    with hub.fetching():
        assert not constants.HF_HUB_OFFLINE


def test_who_says_to_be_offline_is(monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "_try", lambda address: pytest.fail("tried"))
    with pytest.raises(ConfigError, match=r"cannot be reached \(HF_HUB_OFFLINE is set\)"):
        local_file("hf-hub:me/it/a.bin", "head")
    assert caplog.messages == []
    assert constants.HF_HUB_OFFLINE
