"""The way to a Ray cluster, before there is one: addresses, deadlines, retries, and the folders of killed processes."""

import os
import signal
import socket
import threading
import time
import types
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config.parts import Ray
from rlfusion.rollout import RolloutError, Settings, ray_address, ray_folders
from rlfusion.rollout.ray_address import require_address, require_cluster

GOOD = [
    "",
    "auto",
    "127.0.0.1:6379",
    "head:1",
    "head-1.example.org:65535",
    "[::1]:6379",
    "ray://head:10001",
    "ray://[::1]:1",
]
BAD = [
    "127.0.0.1", "head", "head:", ":6379", "head:0", "head:65536", "head:99999", "head:-1", "head:port",
    "head:6379/", "head:63 79", "http://head:6379", "https://head:6379", "tcp://head:1", "ray:/head:1",
    "ray://", "ray://head", "ray://head:0", "ray://ray://head:1", " head:6379", "head:6379 ", "head :6379",
    "head: 6379", "he ad:6379", "head:6379\n", "head:6379,other:6379", "me@head:6379", "local", "Auto",
    "auto ", "AUTO:1:2", "::1:6379", "[::1]", "[head]:1", "head:٣", "-head:1", "head-:1",
    "redis_password:head:1", "head:6379#",
]  # fmt: skip


@pytest.mark.parametrize("address", GOOD)
def test_addresses_are_read(address):
    require_address(address)
    assert Ray(address=address).settings(1, 1, "cpu").address == address


@pytest.mark.parametrize("address", BAD)
def test_what_is_no_address_is_refused_with_what_is_one(address):
    with pytest.raises(ConfigError, match=r"expected host:port such as 10.0.0.1:6379, ray://host:port, auto") as caught:
        Settings(address=address)
    assert repr(address) in str(caught.value)


@pytest.mark.parametrize("name", ["connect_timeout_s", "start_timeout_s"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_times_are_above_0(name, value):
    with pytest.raises(ConfigError, match=f"{name} = "):
        Settings(**{name: value})


@pytest.fixture(autouse=True)
def _nothing_answered(monkeypatch):
    monkeypatch.setattr(ray_address, "_answered", set())


@contextmanager
def listener(backlog: int = 5):
    """The address of something that listens and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=backlog) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1", "nowhere.invalid:6379"])
def test_where_nothing_listens_is_said_in_seconds(address):
    began = time.monotonic()
    with pytest.raises(RolloutError, match=r"no Ray cluster at ray\.address = ") as caught:
        require_cluster(address, 60.0)
    assert time.monotonic() - began < 20.0
    assert caught.value.exit_code == 69
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["x..y", f"{'a' * 64}.org", "a" * 300])
def test_a_host_whose_name_cannot_be_one_is_refused(host):
    with pytest.raises(ConfigError, match="is no name of a host"):
        ray_address.require_cluster(f"{host}:6379", 1.0)


def test_a_name_that_nobody_looks_up_is_given_up_at_the_deadline(monkeypatch):
    asked = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *given, **named: asked.wait(60))
    began = time.monotonic()
    try:
        with pytest.raises(RolloutError, match=r"within ray.connect_timeout_s = 0.2 s"):
            require_cluster("head.example.org:6379", 0.2)
    finally:
        asked.set()
    assert time.monotonic() - began < 10.0


def test_what_listens_and_does_not_answer_is_given_up_at_the_deadline(monkeypatch):
    monkeypatch.setattr(ray_address, "TRY", "import time; time.sleep(600)")
    began = time.monotonic()
    with listener() as address, pytest.raises(RolloutError, match=r"within ray.connect_timeout_s = 0.5 s"):
        require_cluster(address, 0.5)
    assert time.monotonic() - began < 10.0


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            'print(\'["ray", "RuntimeError: Version mismatch"]\')',
            "no Ray cluster at .*: RuntimeError: Version mismatch",
        ),
        (
            'print(\'["worker", "ModuleNotFoundError: No module named rlfusion"]\')',
            "have no rlfusion .*No module named rlfusion.*: expected it installed on every node",
        ),
        ("import sys; sys.exit('a word on stderr')", "no Ray cluster at .*: a word on stderr"),
        ("print('no JSON')", "no Ray cluster at .*: exit code 0"),
    ],
)
def test_what_the_trying_process_says_comes_back_in_a_line(script, said, monkeypatch):
    monkeypatch.setattr(ray_address, "TRY", script)
    with listener() as address, pytest.raises(RolloutError, match=said):
        require_cluster(address, 60.0)


def test_an_address_that_answered_is_not_tried_again(monkeypatch):
    monkeypatch.setattr(ray_address, "TRY", 'print(\'["worker", ""]\')')
    with listener() as address:
        require_cluster(address, 60.0)
    monkeypatch.setattr(ray_address, "TRY", "import sys; sys.exit('again')")
    require_cluster(address, 60.0)
    require_cluster("", 60.0)


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("127.0.0.1:1", 69, "rlfusion: unavailable: no Ray cluster at ray.address = '127.0.0.1:1'"),
        ("ray://127.0.0.1:1", 69, "rlfusion: unavailable: no Ray cluster at ray.address = 'ray://127.0.0.1:1'"),
        ("127.0.0.1", 2, "expected host:port"),
        ("127.0.0.1:99999", 2, "expected host:port"),
        ("http://127.0.0.1:6379", 2, "expected host:port"),
    ],
)
def test_a_run_ends_before_any_work_in_one_line(address, code, said, tmp_path, capsys):
    root = tmp_path / "runs"
    given = ["finetune", "--root", str(root), "--rollout.workers", "2", "--ray.address", address]
    began = time.monotonic()
    assert main(given) == code
    assert time.monotonic() - began < 60.0
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not root.exists()


# --- a private cluster that is slow to start ---

WRITTEN = (
    "METRICS_AGENT_PORT_NAME",
    "METRICS_EXPORT_PORT_NAME",
    "DASHBOARD_AGENT_LISTEN_PORT_NAME",
    "RUNTIME_ENV_AGENT_PORT_NAME",
)
"""The files of ports that later versions of Ray wait for."""


def test_a_private_cluster_is_tried_twice_and_then_given_up_in_a_line(monkeypatch):
    cluster = pytest.importorskip("rlfusion.rollout.ray_cluster")
    starts = []

    def start(folder, *given):
        starts.append((folder, given))
        return "" if len(starts) == succeeds else "The current node timed out during startup."

    monkeypatch.setattr(cluster, "_start", start)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "needed", lambda: None)
    monkeypatch.setattr(cluster, "watched", lambda _: nullcontext())
    succeeds = 2
    with cluster.cluster(Settings(start_timeout_s=77.0), 3, 1):
        assert starts[1][1][:3] == (3, 1, 77.0)
        assert not starts[0][0].exists()
        assert (starts[1][0] / "token").exists()
    assert not starts[1][0].exists()
    starts.clear()
    succeeds = 0
    said = r"did not start on this machine in 2 tries, .*ray.start_timeout_s = 77 s \(The current node timed out"
    with pytest.raises(RolloutError, match=said), cluster.cluster(Settings(start_timeout_s=77.0)):
        pass
    assert len(starts) == 2


def test_a_node_that_is_listed_late_is_waited_for(monkeypatch):
    cluster = pytest.importorskip("rlfusion.rollout.ray_cluster")
    asked = []

    def look_up(*given):
        asked.append(given)
        if len(asked) < 3:
            raise RuntimeError("not listed yet")
        return "it"

    monkeypatch.setattr(cluster, "POLL_S", 0.001)
    monkeypatch.setattr(cluster.services, "get_node", look_up)
    ports = ExitStack()  # none is asked for
    with cluster._patient(60.0, [], ports):
        assert cluster.services.get_node("a", "b") == "it"
    assert asked == [("a", "b")] * 3
    asked.clear()
    with cluster._patient(0.0, [], ports), pytest.raises(RuntimeError):
        cluster.services.get_node("a", "b")
    assert cluster.services.get_node is look_up
    ended = types.SimpleNamespace(poll=lambda: 1)  # its raylet, say: there is nothing more to wait for
    with cluster._patient(600.0, [ended], ports), pytest.raises(RuntimeError):
        cluster.services.get_node("a", "b")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="how Linux gives out ports")
def test_the_port_of_an_agent_is_given_to_nobody_before_the_agent_binds_it(monkeypatch):
    """Others take ports in between, as a busy machine does, and one that knows the number tries that very one."""
    cluster = pytest.importorskip("rlfusion.rollout.ray_cluster")
    monkeypatch.setattr(cluster, "_core", types.SimpleNamespace(**{name: name for name in WRITTEN}))
    with ExitStack() as ports, ExitStack() as others:
        port = cluster._unwritten_ports(ports)["RUNTIME_ENV_AGENT_PORT_NAME"]
        taken = {others.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(300)}
        assert port not in taken
        with socket.socket() as plain, pytest.raises(OSError, match="Address already in use"):
            plain.bind(("127.0.0.1", port))
        with socket.socket() as agent:  # as Ray's own binds it
            agent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            agent.bind(("127.0.0.1", port))
            agent.listen()
            socket.create_connection(("127.0.0.1", port)).close()
    with socket.socket() as again:
        again.bind(("127.0.0.1", port))  # it is given back


# --- the folders of killed processes ---


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_folders.tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_the_folder_of_a_killed_process_is_removed_at_the_next_start_and_that_of_a_living_one_is_not(temporary):
    reader, writer = os.pipe()
    killed = os.fork()
    if killed == 0:
        with ray_folders.private_folder() as folder:
            (folder / "token").write_text("secret")
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    assert os.read(reader, 1) == b"x"
    (left,) = temporary.iterdir()
    assert (left / "owner").read_text() == f"{killed}\n"
    assert ray_folders.sweep() == []
    assert (left / "token").exists()
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    with ray_folders.private_folder() as folder:
        assert list(temporary.iterdir()) == [folder]
        assert ray_folders.sweep() == []
    assert list(temporary.iterdir()) == []


def test_what_is_not_surely_ours_and_dead_is_left_alone(temporary, monkeypatch):
    def make(name: str, owner: bool = True, mode: int = 0o700):
        folder = temporary / name
        folder.mkdir()
        if owner:
            (folder / "owner").write_text("1\n")
        folder.chmod(mode)
        return folder

    ours = make("rlf-dead")
    make("rlf-scratch", owner=False)
    make("rlf-open", mode=0o755)
    make("other-dead")
    (temporary / "rlf-file").write_text("")
    (temporary / "rlf-link").symlink_to(make("linked"))
    owner_is_a_link = make("rlf-odd", owner=False)
    (owner_is_a_link / "owner").symlink_to(temporary / "rlf-file")
    monkeypatch.setattr(ray_folders.os, "getuid", lambda: os.geteuid() + 1)
    assert ray_folders.sweep() == []
    monkeypatch.undo()
    monkeypatch.setattr(ray_folders.tempfile, "tempdir", str(temporary))
    assert ray_folders.sweep() == [ours]
    kept = {path.name for path in temporary.iterdir()}
    assert kept == {"rlf-scratch", "rlf-open", "other-dead", "rlf-file", "rlf-link", "linked", "rlf-odd"}
