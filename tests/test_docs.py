"""Every block of code in README, CONTRIBUTING and docs does what it says.

Python runs as it stands. A line of a shell is looked at by what it calls: ``rlfusion`` reads it with the real parser,
and checks it as it would before any work, with the files that it names made on the spot; commands that take seconds run
to their end. YAML and TOML are read by what reads them in use. A comment before a block, ``<!-- settings only: why
-->``, says that its commands need what is not here (weights of the hub, an environment): their settings are read.
"""

import ast
import re
import shlex
import shutil
import sys
import tomllib
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from fake_ray import FakeRay
from reward_servers import serving
from safetensors.torch import save_file
from tiny_pipelines import stable_diffusion

import rlfusion as rlf
from rlfusion.cli import tables
from rlfusion.cli.main import COMMANDS, main
from rlfusion.config.launch import Launch
from rlfusion.jobs.supervise import Supervise

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]+) -->\n)?^ *```(?P<kind>.*)\n(?P<text>(?:.*\n)*?)^ *```$", re.MULTILINE)
EXECUTED = {"run_sample", "run_check_reward", "run_check_agent", "run_doctor", "run_autoencoder", "run_clip"}
"""What is run to its end, of ``rlfusion.cli.tables``; of the others all that comes before their work."""
PIPELINES = ("HUB-ID", "stable-diffusion-v1-5/stable-diffusion-v1-5")
FEW = ("--steps", "2")
MADE = {
    "runs/autoencoder-digits-seed0": ("pretrain-autoencoder",),
    "runs/tiny": ("train-clip", "--name", "tiny"),
}
"""Runs that a page names and another of its commands makes; here of few steps."""
RUNS = ("NAME", "TRIAL", "base", "ddpo-class_logprob-seed0", "ddpo-left_heavy-seed0", "emoji")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


class Block(NamedTuple):
    """A block of code: where it is, the comment before it, its language, its text."""

    place: str
    mark: str
    kind: str
    text: str


def blocks_of(page: str, text: str) -> list[Block]:
    """The blocks of a page, by the line at which each begins."""
    places = (f"{page}:{text[: match.start('kind')].count(chr(10)) + 1}" for match in BLOCK.finditer(text))
    return [Block(place, *(word or "" for word in m.groups())) for place, m in zip(places, BLOCK.finditer(text))]


BLOCKS = [block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text())]


def of(kind: str) -> list:
    return [pytest.param(block, id=block.place) for block in BLOCKS if block.kind == kind]


def lines(block: Block) -> list[list[str]]:
    """The words of each command of a shell's block; what is behind a pipe, an arrow or an ``&&`` is another."""
    found: list[list[str]] = []
    for line in block.text.replace("\\\n", " ").splitlines():
        tokens = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        tokens.whitespace_split = True
        found.append([])
        for token in tokens:
            if set(token) <= set(";&|<>"):
                found.append([])
            else:
                found[-1].append(token)
    return [command for command in found if command]


COMMANDS_OF_PAGES = [
    pytest.param(command, block.mark, id=f"{block.place}-{number}")
    for block in BLOCKS
    if block.kind == "bash"
    for number, command in enumerate(lines(block))
]


@pytest.fixture(scope="module")
def folder(tiny_root, tmp_path_factory) -> Path:
    """A working directory with what the pages name: runs, pipelines, prompts, pictures, rewards, an agent."""
    place = tmp_path_factory.mktemp("docs")
    (place / "runs").mkdir()
    for name in RUNS:
        run = shutil.copytree(tiny_root / "first", place / "runs" / name)  # some lines change it
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_text(config.replace(str(tiny_root), str(place / "runs")))
    (place / "runs" / "cache").symlink_to(tiny_root / "cache")
    for name in ("emoji-clip", "emoji-colourful"):
        (place / "runs" / name).mkdir()
        (place / "runs" / name / "best").symlink_to(place / "runs" / "emoji" / "model")
    for name in PIPELINES:
        stable_diffusion().save_pretrained(place / name)
    (place / "benchmarks").symlink_to(ROOT / "benchmarks")
    (place / "examples").symlink_to(ROOT / "examples")
    (place / "my_agent.py").write_text((ROOT / "examples" / "own_agent.py").read_text().replace("LeaveOneOut", "Mine"))
    (place / "prompts.txt").write_text("a red cat\na green cat\n")
    (place / "prompts.csv").write_text("prompt\na red cat\na green cat\n")
    low_rank = {f"lora_unet_x.lora_{end}.weight": torch.ones(2, 2) for end in ("down", "up")}
    (place / "peft-folder").mkdir()
    for file in ("style.safetensors", "peft-folder/adapter_model.safetensors"):
        save_file(low_rank, place / file)
    (place / "their.py").write_text("def scorer(images, prompts):\n    return images.mean((1, 2, 3))\n")
    for block in BLOCKS:
        if block.kind == "python" and (name := re.match(r"# (\w+\.py)\n", block.text)) and name[1] != "my_rewards.py":
            (place / name[1]).write_text(block.text)
    template = next(block.text for block in BLOCKS if block.kind == "python" and "class Contrast" in block.text)
    (place / "my_rewards.py").write_text(
        template + "\n\ndef score(samples, cond):\n    return samples.mean((1, 2, 3))\n"
    )
    _photos(place / "photos")
    _photos(place / "me" / "data")
    (place / "me" / "data" / "metadata.csv").write_text(
        "file_name,text\n" + "".join(f"{c}/{i}.png,a {c} {i % 2}\n" for c in ("cat", "dog") for i in range(16))
    )
    return place


def _photos(place: Path) -> None:
    from PIL import Image

    for name, grey in (("cat", 60), ("dog", 160)):
        (place / name).mkdir(parents=True)
        for i in range(16):
            Image.new("RGB", (40, 36), (grey, grey + i, grey)).save(place / name / f"{i}.png")


@pytest.fixture
def place(folder, monkeypatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    return folder


@pytest.mark.parametrize("block", of("python"))
def test_python_runs_as_it_stands(block, place):
    held: dict = {"__name__": "page"}
    exec(compile(block.text, block.place, "exec"), held)
    for said in re.finditer(r"^(\w+) = .*# (\([\d, ]+\)) in \[0, 1\]$", block.text, re.MULTILINE):
        samples = held[said[1]]
        assert tuple(samples.shape) == ast.literal_eval(said[2])
        assert 0 <= float(samples.min()) <= float(samples.max()) <= 1


@pytest.mark.parametrize(("command", "mark"), COMMANDS_OF_PAGES)
def test_a_command_is_one(command, mark, place, monkeypatch, capsys):
    while re.fullmatch(r"[A-Z_]+=\S*", command[0]):
        command = command[1:]
    program = Path(command[0]).name
    assert program in PROGRAMS, f"{program}: say what is to be tested of it"
    PROGRAMS[program](command[1:], mark, monkeypatch)


def run_rlfusion(arguments: list[str], mark: str, monkeypatch) -> None:
    """The command, up to its work; to its end where that takes seconds."""
    assert not mark or re.match("settings only: |run command|test command", mark)
    if mark.startswith("settings only") or "--help" in arguments:
        with pytest.raises(SystemExit) as printed:
            main([*arguments, "--print_config"])
        assert printed.value.code == 0
        return
    make_runs(arguments)
    _without_a_cluster(arguments, monkeypatch)
    arguments = [*arguments, *FEW] if arguments[0] in ("pretrain-autoencoder", "train-clip") else arguments
    began = []
    for name in vars(tables):
        if name.startswith("run_") and name not in EXECUTED:
            monkeypatch.setattr(tables, name, lambda *settings: began.append(settings))
    with served(arguments) as (arguments, elsewhere):
        monkeypatch.setenv("RLFUSION_REWARD_TOKEN", "a-token-of-the-tests" if elsewhere else "")
        assert main(arguments) == 0


def _without_a_cluster(arguments: list[str], monkeypatch) -> None:
    """Jobs go to a client of the tests' own, where ``jobs`` finds ``bright``; what is supervised is read alone."""
    fake = FakeRay()
    if arguments[0] == "jobs":
        fake.add("bright", "RUNNING" if arguments[1] == "stop" else "STOPPED", about={"folder": "/shared/runs/bright"})
    monkeypatch.setattr("rlfusion.jobs.launch.cluster._client", lambda *_: fake)
    monkeypatch.setattr("rlfusion.jobs.supervise.supervise", lambda settings, command, *_: main_settings(command))


def main_settings(command: list[str]) -> int:
    """Read the settings of a command, and no more."""
    with pytest.raises(SystemExit) as printed:
        main([*command, "--print_config"])
    return printed.value.code


def make_runs(arguments: list[str]) -> None:
    """What other commands of a page leave, and this one reads."""
    for name, command in MADE.items():
        if any(name in word for word in arguments[1:]) and command[0] != arguments[0] and not Path(name).exists():
            assert main([*command, *FEW]) == 0


@contextmanager
def served(arguments: list[str]):
    """The arguments, with the address of a reward that is served here in the place of the one that a page says."""
    said = "http://127.0.0.1:8500"
    if arguments[0] == "serve-reward" or not any(said in word for word in arguments):
        yield arguments, False
        return
    token = Path.home() / ".reward-token"
    token.write_text("a-token-of-the-tests")
    token.chmod(0o600)
    with serving(lambda samples, cond: samples.mean((1, 2, 3)), "a-token-of-the-tests") as address:
        yield [word.replace(said, address) for word in arguments], True


def run_python(arguments: list[str], mark: str, monkeypatch) -> None:
    """A script of ours is there, and has the options."""
    if arguments[:2] == ["-m", "venv"]:
        return
    tree = ast.parse((ROOT / arguments[0]).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    options = {arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)}
    assert {word for word in arguments[1:] if word.startswith("--")} <= options


def run_pip(arguments: list[str], mark: str, monkeypatch) -> None:
    """The extras are those of the project."""
    ours = [word for word in arguments if not word.startswith("ray[")]
    extras = [name for word in ours for found in re.findall(r"\[([\w,]+)\]", word) for name in found.split(",")]
    assert set(extras) <= set(PROJECT["optional-dependencies"])


def run_make(arguments: list[str], mark: str, monkeypatch) -> None:
    for name in arguments:
        assert f"\n{name}:" in MAKEFILE


def run_script(arguments: list[str], mark: str, monkeypatch) -> None:
    assert (ROOT / arguments[0]).exists()


def run_nothing(arguments: list[str], mark: str, monkeypatch) -> None:
    """A tool of the system."""


def run_on_a_file(arguments: list[str], mark: str, monkeypatch) -> None:
    """A tool of a cluster gets a file of ours; ``tests/test_cluster_examples.py`` reads them."""
    named = [word for word in arguments if word.startswith("examples/")]
    assert all((ROOT / word).is_file() for word in named)
    assert named or arguments[0] == "start"


PROGRAMS = {
    **dict.fromkeys(("ray", "kubectl", "sbatch", "docker", "bash"), run_on_a_file),
    "rlfusion": run_rlfusion,
    "python": run_python,
    "python3": run_python,
    "pip": run_pip,
    "make": run_make,
    "sh": run_script,
    **dict.fromkeys(
        ("cd", "git", "head", "base64", ".reward-token", "chmod", "pre-commit", "source", "npm"), run_nothing
    ),
}


@pytest.mark.parametrize("block", of("toml"))
def test_an_entry_point_is_of_a_group_that_is_looked_at(block):
    from rlfusion.jobs.doors import DOORS

    (group,) = tomllib.loads(block.text)["project"]["entry-points"]
    assert group in {f"rlfusion.{name}" for name in DOORS}


@pytest.mark.parametrize("block", of("yaml"))
def test_settings_of_a_file_are_read(block, place, capsys):
    (place / "settings.yaml").write_text(block.text)
    (command,) = re.findall(r"^# rlfusion ([\w-]+) --config", block.text, re.MULTILINE) or ["finetune"]
    with pytest.raises(SystemExit):
        main([command, "--config", "settings.yaml", "--print_config"])
    said = yaml.safe_load(block.text.replace("their.py", str(place / "their.py")))
    told = yaml.safe_load(capsys.readouterr().out)
    assert {name: told[name] for name in said} == said


DESIGN = (ROOT / "docs" / "design.md").read_text()


def test_every_room_has_a_row():
    rows = set(re.findall(r"^\| `([\w/]+)/` \|", DESIGN, re.MULTILINE))
    assert rows == {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("rlfusion/*/__init__.py")} | {
        "agents",
        "envs",
        "rewards",
    }


def test_the_path_of_a_batch_is_the_one_that_it_takes():
    """The functions of docs/design.md are called for the first time in the order of the page."""
    told = [f"rlfusion.{name}" for name in re.findall(r"^\| \d+ \| `([\w.]+)` \|", DESIGN, re.MULTILINE)]
    model = rlf.Model.of(rlf.Denoiser(Tiny(), rlf.Cosine(), "x0"), (1, 2, 2), chain={"steps": 2, "last_noise": 0.1})
    run = rlf.finetune(model, "ink", updates=2, rollout={"prompts": 1, "samples_per_prompt": 4})
    next(run)  # with the checks that come before the first update
    seen: dict[str, None] = {}

    def note(frame, event, _):
        if event == "call":
            seen.setdefault(f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}")

    sys.setprofile(note)
    try:
        next(run)
    finally:
        sys.setprofile(None)
    assert len(told) == 21
    assert [name for name in seen if name in told] == told


class Tiny(torch.nn.Module):
    """A network of four weights."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((1, 2, 2), 0.5))

    def forward(self, x, t, cond):
        return self.scale * x


def test_every_block_has_a_language_that_is_looked_at():
    fences = sum(len(re.findall(r"^ *```", page.read_text(), re.MULTILINE)) for page in PAGES)
    assert fences == 2 * len(BLOCKS)
    assert {block.kind for block in BLOCKS} == {"python", "bash", "yaml", "toml", "text"}
    assert [block.place for block in BLOCKS if block.kind != "bash" and block.mark.startswith("settings")] == []


def test_words_of_a_shell_are_told_apart():
    block = Block("", "", "bash", "A=b sh x 'y # z'  # why\nrlfusion finetune --a \\\n  'b c' && make d | e > f &\n")
    told = [["A=b", "sh", "x", "y # z"], ["rlfusion", "finetune", "--a", "b c"], ["make", "d"], ["e"], ["f"]]
    assert lines(block) == told
    assert blocks_of("p", "x\n\n```js\n1\n```\n") == [Block("p:3", "", "js", "1\n")]


TEXTS = {str(page.relative_to(ROOT)): re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL) for page in PAGES}
"""The pages without their blocks."""
OTHER_TOOLS = {
    "--chain.eta",
    "--lr",
    "--address",
    "--against",
    "--case",
    "--cpu-time",
    "--dashboard-host",
    "--requeue",
    "--head",
    "--logdir",
    "--port",
    "--threads",
}
"""Options in sentences that ``rlfusion`` does not have, and says so, or that are of other tools."""


def options() -> set[str]:
    """Every option of every command, with any agent or method; and the words of the command line."""
    from rlfusion import config, distill
    from rlfusion.agents import AGENTS
    from rlfusion.cli.settings_tree import tree

    typed = [config.with_agent(name) for name in AGENTS.names()]
    typed += [config.with_method(name) for name in distill.METHODS.names()]
    plain = ("Pretrain", "Autoencode", "TrainClip", "Compare", "Sample", "Evaluate", "CheckModel", "CheckReward")
    typed += [getattr(config, name) for name in (*plain, "CompareRuns", "CheckAgent", "Reproduce", "Serve", "Board")]
    typed += [Launch, Supervise]
    of_lines = {"help", "config", "print_config", "resume", "change", "objective", "model", "adapters"}
    of_lines |= {"quiet", "json"}
    return of_lines.union(*(tree(settings).names() for settings in typed))


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_sentence_names_is_there(page):
    """Commands, options, public names, pages and headings."""
    text = TEXTS[page]
    assert {found.split()[1] for found in re.findall(r"`(rlfusion [^`\n]+)`", text)} <= {*COMMANDS, "help"}
    assert set(re.findall(r"\brlf\.(\w+)", text)) <= {*rlf.__all__, "__all__"}
    quoted = re.findall(r"(?<![\w`-])--[a-z][\w.]*(?:-[a-z]+)?", " ".join(re.findall(r"`([^`]+)`", text)))
    known = options()
    unknown = {word for word in quoted if not word[2:].rstrip("*.").startswith(tuple(known))} - OTHER_TOOLS
    assert {word for word in unknown if not any(name.startswith(word[2:].rstrip("*")) for name in known)} == set()
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, heading = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), target
        headings = (
            {
                re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.*)", there.read_text("utf-8"), re.MULTILINE)
            }
            if heading
            else {heading}
        )
        assert heading in headings, target
