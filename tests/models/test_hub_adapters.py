"""Adapters by their name on the hub, held to a stand-in of it: which file, which revision, from the cache, or not."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import safetensors.torch
import torch
from hubs import begin_anew
from huggingface_hub import constants

from rlfusion.common import hub
from rlfusion.common.errors import ConfigError
from rlfusion.models.pipelines import adapters
from rlfusion.models.pipelines.hub_adapters import is_named

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


def weights(value: float) -> bytes:
    return safetensors.torch.save({"unet.q.lora_A.weight": torch.full((1, 2), value)})


HELD = {
    "me/one": {"style.safetensors": weights(1.0), "README.md": b"it"},
    "me/many": {"a.safetensors": weights(1.0), "sub/b.safetensors": weights(2.0)},
    "me/peft": {adapters.PEFT: weights(3.0), adapters.SETTINGS: b'{"r": 1}', "other.safetensors": weights(4.0)},
    "me/usual": {adapters.LORA: weights(5.0), "a.safetensors": weights(6.0)},
    "me/none": {"README.md": b"it"},
}
"""{repository: {file: content}}; of the revision v2 every file of weights is of the value 9."""


class Hub(BaseHTTPRequestHandler):
    """What the hub's client asks for."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        if (content := self.answer()) is not None:
            self.wfile.write(content)

    def answer(self) -> bytes | None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        commit, content = "", None
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            files = HELD.get("/".join(parts[2:4]), {})
            told = [{"type": "file", "path": name, "size": len(held), "oid": "0" * 40} for name, held in files.items()]
            content = json.dumps(told).encode()
        elif parts[2:3] == ["resolve"]:
            commit = COMMITS.get(parts[3], "")
            content = HELD.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))
            if content is not None and parts[3] == "v2" and parts[-1].endswith(".safetensors"):
                content = weights(9.0)
        found = content is not None and (commit or parts[0] == "api" or not parts[0])
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content) if found and content is not None else 0))
        self.send_header("Content-Type", "application/json")
        if found and commit:
            self.send_header("ETag", f'"{hashlib.sha256(content or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
        elif not found:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        return content if found else None

    def log_message(self, *about: object) -> None:
        pass


@pytest.fixture
def there(tmp_path, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    """The hub, which ``shutdown`` takes away, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    begin_anew(monkeypatch, tmp_path / "cache")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def value(one: adapters.Adapter) -> float:
    (held,) = safetensors.torch.load_file(adapters.weights(Path(one.file))).values()
    return held.flatten()[0].item()


@pytest.mark.parametrize(
    ("text", "expected", "scale"),
    [
        ("me/one", 1.0, 1.0),
        ("me/one:0.5", 1.0, 0.5),
        ("me/many:sub/b.safetensors", 2.0, 1.0),
        ("me/many:sub/b.safetensors@v2:-0.25", 9.0, -0.25),
        ("me/one@v2", 9.0, 1.0),
        ("me/peft", 3.0, 1.0),
        ("me/usual", 5.0, 1.0),
    ],
)
def test_a_name_is_a_file_of_its_repository(text, expected, scale, there):
    (one,) = adapters.parse(text)
    assert (value(one), one.scale) == (expected, scale)
    assert one.sha256 == adapters.digest(Path(one.file))
    settings = adapters.weights(Path(one.file)).with_name(adapters.SETTINGS)
    assert settings.is_file() == (text == "me/peft"), "peft's settings lie beside peft's file"


def test_without_the_hub_the_cache_answers(there, monkeypatch, caplog):
    online = adapters.parse("me/one:style.safetensors, me/many:a.safetensors:2, me/usual")
    adapters.parse("me/peft:other.safetensors, me/one")
    there.shutdown()
    there.server_close()
    monkeypatch.setattr(hub, "_tried", {})
    assert adapters.parse("me/one:style.safetensors, me/many:a.safetensors:2, me/usual") == online
    assert "cannot be reached" in caplog.messages[0]
    for text in ("me/one", "me/many", "me/peft", "me/none"):  # the cache may hold a part of them
        with pytest.raises(ConfigError, match=rf"'{text}'.*cannot be reached.*expected OWNER/NAME:FILE") as caught:
            adapters.parse(text)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("me/many", r"it holds a.safetensors, sub/b.safetensors: expected OWNER/NAME:FILE"),
        ("me/none", r"it holds no .safetensors"),
        ("me/one:gone.safetensors", r"not to be had from the hub \(.*EntryNotFound"),
        ("me/one:b.bin", "expected FILE:STRENGTH"),
        ("me/one:0", "expected FILE:STRENGTH"),
        ("runs/it", "or OWNER/NAME of the hub"),
        ("loras/it.safetensors", "there is no it.safetensors"),
    ],
)
def test_what_names_no_one_file_is_refused(text, said, there):
    with pytest.raises(ConfigError, match=said) as caught:
        adapters.parse(text)
    assert "\n" not in str(caught.value)


def test_what_lies_here_comes_first(there, tmp_path):
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / "one").mkdir()
    (tmp_path / "me" / "one" / adapters.LORA).write_bytes(weights(7.0))
    (one,) = adapters.parse("me/one")
    assert value(one) == 7.0
    assert not is_named("runs/it")
    assert not is_named("./a/b")
