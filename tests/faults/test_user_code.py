"""What a user's own code raises is one line that says where, and its own frames alone; and so across processes."""

import pickle
import signal
from concurrent.futures import Future

import pytest
import torch
from reward_servers import client, serving

from rlfusion.cli import main
from rlfusion.common.errors import ConfigError, UserCodeError
from rlfusion.rewards import RewardFailure, build, score
from rlfusion.rewards.remote.grading import graded

FILE = """
import json
import torch

def helper(samples):
    raise ValueError("no\\nscore")

def raises(samples, cond):
    return helper(samples)

def inside_torch(samples, cond):
    return torch.zeros(3) @ torch.zeros(4)

def inside_python(samples, cond):
    return json.loads("{")

def leaves(samples, cond):
    raise SystemExit(0)

class Made:
    def __init__(self, level: int = 0) -> None:
        self.level = 1 / level

    def __call__(self, samples, cond):
        return samples.mean((1, 2, 3))

class Module(torch.nn.Module):
    def forward(self, samples, cond):
        return self.absent
"""
SAMPLES = torch.rand(4, 1, 8, 8)


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(FILE)
    return tmp_path / "own.py"


@pytest.mark.parametrize(
    ("name", "said", "depth"),
    [
        ("raises", "ValueError: no score (own.py, line 6, in helper)", 2),
        ("inside_torch", "(own.py, line 12, in inside_torch)", 1),
        ("inside_python", "JSONDecodeError: Expecting property name", 1),
        ("leaves", "it calls sys.exit(0) (own.py, line 18, in leaves)", 1),
        ("Module", "AttributeError: 'Module' object has no attribute 'absent' (own.py, line 29, in forward)", 1),
    ],
)
def test_a_reward_that_raises_is_code_3_with_its_line_and_its_own_frames(own, name, said, depth):
    with pytest.raises(UserCodeError) as caught:
        score(build(f"own.py:{name}"), SAMPLES, None, name)
    error = caught.value
    assert error.exit_code == 3
    assert said in str(error)
    assert str(error).startswith(f"reward {name!r} on samples (4, 1, 8, 8): ")
    assert "\n" not in str(error)
    assert error.frames.count(f'File "{own}"') == error.frames.count("File ") == depth
    again = pickle.loads(pickle.dumps(error))  # as it comes from a Ray worker
    assert (str(again), again.frames) == (str(error), error.frames)


def test_a_constructor_that_raises(own):
    with pytest.raises(UserCodeError, match=r"ZeroDivisionError: division by zero \(own.py, line 22, in __init__\)"):
        build("own.py:Made", {"own.py:Made": {"level": 0}})


@pytest.mark.parametrize(
    ("text", "said", "frames"),
    [
        (
            "def f(samples, cond)\n    return 1\n",
            r"SyntaxError: expected ':' \(mine.py, line 1\)",
            "def f(samples, cond)",
        ),
        ("import nosuch_lib\n", r"No module named 'nosuch_lib' \(mine.py, line 1\)", "import nosuch_lib"),
        ("\n\nx = undefined\n", r"NameError: name 'undefined' is not defined \(mine.py, line 3\)", "x = undefined"),
        ("raise SystemExit('bye')\n", r"it calls sys.exit\('bye'\) \(mine.py, line 1\)", "raise SystemExit"),
        ("if True:\nx\n", r"IndentationError: expected an indented block", "x"),
        ("from json import nosuch\n", r"ImportError: cannot import name 'nosuch' from 'json'", "from json"),
    ],
)
@pytest.mark.parametrize("name", ["mine.py:f", "mine:f"])
def test_a_file_that_cannot_be_loaded_is_code_2_with_its_line(tmp_path, monkeypatch, text, said, frames, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ConfigError, match=f"reward '{name}' cannot be loaded: .*{said}") as caught:
        build(name)
    assert frames in caught.value.frames
    assert caught.value.exit_code == 2
    assert "importlib" not in caught.value.frames


def test_what_rlfusions_own_rewards_raise_is_not_the_users(monkeypatch):
    with pytest.raises(IndexError) as caught:
        score(build("ink"), torch.zeros(4), None, "ink")
    assert caught.value.__notes__ == ["raised by reward 'ink' on samples (4,)"]


def test_a_server_tells_its_client_one_line_and_its_log_the_frames(own, caplog):
    values, reasons, raised = graded(build("own.py:raises"), SAMPLES, torch.zeros(4, dtype=torch.int64))
    assert raised == set(range(4))
    assert bool(values.isnan().all())
    assert reasons == dict.fromkeys(range(4), "it: ValueError: no score (own.py, line 6, in helper)")
    assert len(caplog.records) == 1
    assert caplog.text.count(f'File "{own}"') == 2


def test_what_a_served_reward_raises_is_code_3_for_its_client(own, monkeypatch, capsys):
    label = torch.zeros(4, dtype=torch.int64)
    line = "failed for 4 of 4 samples: it: ValueError: no score (own.py, line 6, in helper)"
    with serving(build("own.py:raises")) as url:

        def run(arguments):
            score(client(url), SAMPLES, label, "mine")

        monkeypatch.setitem(main.COMMANDS, "sample", run)
        assert main.main(["sample"]) == UserCodeError.exit_code == 3
        assert capsys.readouterr().err == f"rlfusion: your code failed: reward {url!r} {line}\n"
        with pytest.raises(UserCodeError) as caught:
            client(url, batch=2)(SAMPLES, label)
        again = pickle.loads(pickle.dumps(caught.value))  # as a Ray worker that asks a server passes it on
        assert (type(again), str(again)) == (type(caught.value), str(caught.value))
        assert score(client(url), SAMPLES, label, "mine", masked=True).isnan().all()
        with serving(client(url)) as relay, pytest.raises(UserCodeError):
            client(relay)(SAMPLES, label)
    with serving(lambda samples, cond: samples.mean((1, 2, 3)) / 0) as url, pytest.raises(RewardFailure) as caught:
        client(url)(SAMPLES, label)
    assert not isinstance(caught.value, UserCodeError)  # no number, and nothing was raised


def test_what_a_reward_raises_in_a_ray_worker_is_code_3_with_its_frames(own):
    from ray.exceptions import RayError, RayTaskError

    from rlfusion.rollout.ray_backend import _cause

    with pytest.raises(UserCodeError) as caught:
        score(build("own.py:raises"), SAMPLES, None, "mine")
    sent = RayTaskError("run", "Traceback", caught.value).as_instanceof_cause()
    arrived = _cause(RayError.from_bytes(RayError.to_bytes(sent)), 3)
    assert type(arrived) is UserCodeError
    assert arrived.exit_code == 3
    assert (str(arrived), arrived.frames) == (str(caught.value), caught.value.frames)
    assert arrived.__notes__ == ["on Ray worker 3"]


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError("size = 0:\nexpected more"), 2, ["rlfusion: size = 0: expected more"]),
        (FileNotFoundError(2, "No such file or directory", "x.npz"), 2, ["rlfusion: 'x.npz' cannot be read: No such "]),
        (PermissionError(13, "Permission denied", "x.npz"), 2, ["rlfusion: 'x.npz' cannot be read: Permission denied"]),
        (OSError(5, "Input/output error", "x.npz"), 74, ["rlfusion: storage: 'x.npz': Input/output error"]),
        (OSError(30, "Read-only file system", "x"), 74, ["rlfusion: storage: 'x': Read-only file system"]),
        (
            ConnectionRefusedError(111, "Connection refused"),
            69,
            ["rlfusion: unavailable: [Errno 111] Connection refus"],
        ),
        (BrokenPipeError(32, "Broken pipe"), 74, ["rlfusion: storage: 'standard output': Broken pipe"]),
        (KeyError("x"), 1, ["rlfusion: unforeseen: KeyError: 'x' (", "Traceback"]),
        (KeyboardInterrupt(), 130, ["rlfusion: stopped by Ctrl-C"]),
    ],
)
def test_every_error_is_one_line_and_a_documented_code(monkeypatch, capsys, error, code, lines):
    failed = Future()
    failed.set_exception(error)
    monkeypatch.setitem(main.COMMANDS, "sample", failed.result)  # a function of this file would be the user's own code
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main.main(["sample"]) == code
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(lines[0])
    assert ("Traceback" in "".join(said)) == (code == 1)
    assert (len(said) == 1) == (code != 1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_the_line_of_the_users_code_comes_first_and_its_frames_below(monkeypatch, capsys, own):
    def run(arguments):
        score(build("own.py:raises"), SAMPLES, None, "mine")

    monkeypatch.setitem(main.COMMANDS, "sample", run)
    assert main.main(["sample"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        "rlfusion: your code failed: reward 'mine' on samples (4, 1, 8, 8): "
        "ValueError: no score (own.py, line 6, in helper)"
    )
    assert [line.split(",")[0].strip() for line in said[1:] if "File" in line] == [f'File "{own}"'] * 2


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a: [1,\nb: }\n", "line 2"),
        (b"a:\n\t- 1\n", "line 2"),
        (b"a: &x [*x, *y]\n", "line 1"),
        (b"\xff\xfe\x00a", ""),
        (b"\x00\x01", ""),
        (b"- 1\n", ""),
        (b"text", ""),
        (b"[" * 5000, ""),
        (b"a: !!python/object:os.system {}\n", ""),
    ],
)
def test_a_broken_configuration_file_is_one_line(tmp_path, capsys, content, line):
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    assert main.main(["finetune", "--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"--config {str(file)!r}" in told
    assert line in told
