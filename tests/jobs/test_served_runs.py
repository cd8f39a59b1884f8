"""Whole runs with rewards from elsewhere: a server killed on the way, a package made outside, the docs' examples."""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from elsewhere import environment
from processes import Process, rlfusion
from reward_servers import client, serving
from tiny_runs import TINY

from rlfusion.common.errors import ConfigError
from rlfusion.config import CheckReward, Serve
from rlfusion.jobs import check_reward
from rlfusion.jobs.serve_reward import make_service
from rlfusion.rewards import RewardFailure, build, task_info

TOKEN = "a-secret-of-24-characters"
MINE = """
import os
import signal
import time
from pathlib import Path


def half(samples, cond):
    return samples[..., :4].mean((1, 2, 3))


def sleeping(samples, cond):
    Path("asleep").touch()
    time.sleep(60)


def dying(samples, cond):
    \"\"\"Kills its process in the middle of the question that the file says.\"\"\"
    file = Path("dies")
    left = int(file.read_text()) - 1 if file.exists() else -1
    if left == 0:
        file.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if left > 0:
        file.write_text(str(left))
    return half(samples, cond)
"""
MIDDLE = 16
"""The question in which the server dies: of a rollout after the run's first checkpoint."""


@pytest.fixture
def root(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    return tmp_path


@contextmanager
def server(root: Path, name: str, port: int = 0):
    """A process of ``serve-reward``, and its address; killed at the end if it still runs."""
    args = (name, "--port", port, "--token_file", "token", "--idle_s", 100)
    process = Process(root, "serve-reward", *args)
    try:
        process.once(lambda: "http://" in process.out.read_text() if process.out.exists() else False, 0)
        yield process, re.search(r"http://[\d.:]+", process.out.read_text())[0]
    finally:
        process.signal(signal.SIGKILL)
        process.process.join()


def weights(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (folder / "model").glob("*.safetensors")}


def train(root: Path, reward: str, name: str, **options):
    given = {"timeout_s": 60, "token_file": str(root / "token")} | options
    more = ("--reward_options", repr({reward: given})) if reward.startswith("http") else ()
    return rlfusion(root, "finetune", *TINY, "--monitor.every", 0, "--reward", reward, "--name", name, *more)


def test_a_server_killed_in_the_middle_costs_nothing(root):
    """With another replica the run goes on; without one it ends by name, and resumes to the same bits."""
    assert train(root, "mine.py:half", "local").code == 0
    expected = weights(root / "runs" / "local")
    with server(root, "mine.py:dying") as (first, url), server(root, "mine.py:dying") as (second, other):
        (root / "dies").write_text(str(MIDDLE))
        said = train(root, f"{url},{other}", "two", patience_s=60)
        assert said.code == 0, said.err
        assert weights(root / "runs" / "two") == expected
        assert [p.process.exitcode for p in (first, second)].count(-signal.SIGKILL) == 1
    with server(root, "mine.py:dying") as (_, url):
        (root / "dies").write_text(str(MIDDLE))
        said = train(root, url, "one", patience_s=0)
        assert said.code == 69
        assert re.search(rf"unavailable: reward '{url}' failed for \d+ of \d+ samples: no server answered", said.err)
    with server(root, "mine.py:dying", port=int(url.rpartition(":")[2])):
        said = rlfusion(root, "finetune", "--resume", "runs/one")
        assert said.code == 0, said.err
        assert "resumed from" in said.err
        assert weights(root / "runs" / "one") == expected


def test_a_wrong_token_is_refused_before_any_work(root):
    with server(root, "mine.py:half") as (process, url):
        (root / "wrong").write_text(TOKEN[::-1])
        (root / "wrong").chmod(0o600)
        said = train(root, url, "it", token_file=str(root / "wrong"))
        assert said.code == 2
        assert "refuses: HTTP 401 the token is wrong or missing" in said.err
        assert TOKEN not in said.err + said.out
        assert not (root / "runs" / "it").exists()
        process.signal(signal.SIGTERM)
        assert process.wait().code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_that_is_scoring(root, number):
    with server(root, "mine.py:sleeping") as (process, url):
        asker = client(url, token_file=str(root / "token"))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(asker, torch.zeros(2, 1, 8, 8), None)
            process.once((root / "asleep").exists, number)
            result = process.wait(20)
            assert (result.code, result.err) == (0, "")
            with pytest.raises(RewardFailure):
                asked.result()


def test_a_server_stops_by_itself_when_nobody_asks(root):
    said = rlfusion(root, "serve-reward", "ink", "--port", 0, "--idle_s", 0.1)
    assert said.code == 0, said.err
    assert re.fullmatch(r"serving ink at http://127\.0\.0\.1:\d+, without a token\n", said.out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("inc",), "did you mean 'ink'"),
        (("class_logprob",), "options.weights = None: expected the file of a classifier"),
        (("clip_score",), "options.model = None: expected a run of train-clip"),
        (("clip_class", "--options", '{"log": true}'), "options.model = None: expected a run of train-clip"),
        (("ink", "--host", "0.0.0.0"), "need a token"),
        (("ink", "--port", 1, "--host", "203.0.113.1", "--token_file", "token"), "cannot be listened on"),
    ],
)
def test_what_cannot_be_served_is_refused(root, arguments, said):
    result = rlfusion(root, "serve-reward", *arguments)
    assert result.code == 2
    assert said in result.err


# --- a package made outside the repository ---


PROJECT = {
    "pyproject.toml": """
        [build-system]
        requires = ["setuptools>=77"]
        build-backend = "setuptools.build_meta"

        [project]
        name = "outside-rewards"
        version = "1.0"

        [project.entry-points."rlfusion.rewards"]
        vignette = "outside_rewards:Vignette"
    """,
    "outside_rewards.py": """
        from dataclasses import dataclass

        import rival


        @dataclass(frozen=True)
        class Vignette:
            strength: float = 1.0

            def __call__(self, samples, cond):
                inner = samples[..., 2:6, 2:6].mean((1, 2, 3))
                return rival.VERSION * (inner - self.strength * samples.mean((1, 2, 3)))
    """,
}
MAIN = "import sys; from rlfusion.cli.main import main; sys.exit(main())"


def install(project: Path, target: Path) -> None:
    """By pip where there is one, else by uv."""
    options = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", target, project]
    if importlib.util.find_spec("pip"):
        command = [sys.executable, "-m", "pip", *options]
    elif shutil.which("uv"):
        command = ["uv", "pip", *options, "--offline", "--python", sys.executable]
    else:
        pytest.skip("neither pip nor uv")
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)


def test_a_package_made_outside_is_found_and_used_and_served_from_its_own_environment(root):
    """Here it finds version 2 of a library, and in its own virtual environment version 1."""
    project, target = root / "project", root / "site"
    project.mkdir()
    for name, text in PROJECT.items():
        (project / name).write_text(textwrap.dedent(text))
    install(project, target)
    (target / "rival.py").write_text("VERSION = 2")
    python = environment(root / "older", rival="VERSION = 1")
    with pytest.raises(ConfigError, match="unknown reward 'vignette'"):
        build("vignette")  # this process has it not
    options = '{"vignette": {"strength": 0.5}}'
    more = ("--reward", "vignette", "--reward_options", options, "--root", root / "runs", "--name", "it")
    said = rlfusion(target, "finetune", *TINY, "--monitor.every", 0, *more)  # where it is on the path
    assert said.code == 0, said.err
    assert "reward vignette" in said.out
    texts = [python, "-c", MAIN, "serve-reward", "vignette", "--options", '{"strength": 0.5}', "--port", "0"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install(project, next((root / "older").glob("lib/python*/site-packages")))
    served = subprocess.Popen([*texts, "--idle_s", "60"], cwd=root, env=env, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://[\d.:]+", served.stdout.readline())[0]
        x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        value = build(url)(x, None)
        assert torch.equal(value, x[..., 2:6, 2:6].mean((1, 2, 3)) - 0.5 * x.mean((1, 2, 3)))
    finally:
        served.terminate()
        served.communicate(timeout=60)


# --- the examples of the docs, with stand-ins for their models ---


DOCS = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


def example(name: str, folder: Path) -> Path:
    """The code block of the docs that begins with the comment ``# NAME``, as a file."""
    (block,) = re.findall(rf"```python\n(# {re.escape(name)}.*?)```", DOCS, flags=re.DOTALL)
    (folder / name).write_text(block)
    return folder / name


def served(file: Path, attribute: str, **options):
    """A context with the address of the real service of an example."""
    service = make_service(Serve(f"{file}:{attribute}", options))
    return serving(None, wants=service.offer.wants, make=service.offer._make)


PROMPTS = ("a cat", "a dog", "two dogs")


def asked_of(url: str, count: int = 6) -> list[float]:
    x = torch.arange(count).reshape(-1, 1, 1, 1).expand(count, 3, 8, 8) / 10
    return client(url, **task_info(PROMPTS, (3, 8, 8)))(x, torch.arange(count) % 3).tolist()


def test_the_image_reward_example(tmp_path, monkeypatch):
    class Model:
        def score(self, prompt, image):
            return len(prompt) + image.getpixel((0, 0))[0] / 255

    module = types.ModuleType("ImageReward")
    module.load = lambda name, device: Model()
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    with served(example("image_reward.py", tmp_path), "ImageReward") as url:
        expected = [len(PROMPTS[i % 3]) + round(25.5 * i) / 255 for i in range(6)]
        assert asked_of(url) == pytest.approx(expected, abs=3e-3)


def test_the_vision_language_example(tmp_path, monkeypatch):
    seen = []

    class Processor:
        tokenizer = types.SimpleNamespace(encode=lambda word, add_special_tokens: [{"yes": 3, "no": 5}[word]])

        def apply_chat_template(self, messages, **_):
            image, text = messages[0]["content"]
            seen.append(text["text"])
            return {"input_ids": torch.tensor([[image["image"].getpixel((0, 0))[0]]])}

    def model(input_ids):
        logits = torch.zeros(1, 1, 8)
        logits[..., 3] = input_ids / 255
        return types.SimpleNamespace(logits=logits)

    def pretrained(made):
        return types.SimpleNamespace(from_pretrained=lambda name: made)

    module = types.ModuleType("transformers")
    module.AutoProcessor = pretrained(Processor())
    module.AutoModelForImageTextToText = pretrained(types.SimpleNamespace(eval=lambda: model))
    monkeypatch.setitem(sys.modules, "transformers", module)
    with served(example("asked.py", tmp_path), "Asked") as url:
        expected = [torch.tensor(i / 10).sigmoid().item() for i in range(6)]
        assert asked_of(url) == pytest.approx(expected, abs=1e-3)
    assert seen[:2] == [f"Does this picture show {p}? Answer yes or no." for p in PROMPTS[:2]]


def test_the_reading_example(tmp_path, monkeypatch):
    module = types.ModuleType("pytesseract")
    module.image_to_string = lambda image: {0: "a cat\n", 26: "a d0g", 51: ""}[image.getpixel((0, 0))[0]]
    monkeypatch.setitem(sys.modules, "pytesseract", module)
    with served(example("reading.py", tmp_path), "Reading") as url:
        assert asked_of(url, 3) == pytest.approx([1.0, 0.8, 0.0])


def test_the_template_passes_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr(check_reward, "SPEED_S", 0.0)

    file = example("my_rewards.py", tmp_path)
    for name in ("left_heavy", "Contrast", "tidier", "unlike_the_others", "worded"):
        found = {f.check: (f.verdict, f.message) for f in check_reward.check_reward(CheckReward(f"{file}:{name}"))}
        assert not [row for row in found.items() if row[1][0] == "FAILS"], name
