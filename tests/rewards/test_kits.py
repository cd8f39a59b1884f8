"""Kits of rewards: each by a stand-in with the published signature, called here and through the protocol under faults;
LPIPS and GenEval's rules for real; environments made, cut short and outdated.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from backbones import NET, random_backbone
from house import ROOT
from kit_packages import PACKAGES, PROMPTS, installed, light, unified_reward
from PIL import Image
from reward_servers import FAULTS, IDENTITY, Faulty, client, http, serving

from rlfusion.cli.main import main
from rlfusion.common.errors import ConfigError
from rlfusion.config import Serve
from rlfusion.jobs import reward_kits
from rlfusion.jobs.serve_reward import make_service
from rlfusion.rewards import RewardError, RewardFailure, build, score, task_info
from rlfusion.rewards.kit import KITS
from rlfusion.rewards.kit.calling import by_name
from rlfusion.rewards.kit.object_checks.rules import Found, met, relations
from rlfusion.rewards.remote.client import Served
from rlfusion.rewards.remote.frames import PROTOCOL, encode

SAMPLES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor(
    [0.1, 0.5, 1.0, 1.0, 2.0]
).clamp(max=1).reshape(5, 1, 1, 1)
SAMPLES[3] = 1.0
LABEL = torch.tensor([0, 1, 2, 1, 0])
RULES = (
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "clock", "count": 1}]},
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "exclude": [{"class": "clock", "count": 1}]},
    {"tag": "single_object", "include": [{"class": "computer mouse", "count": 1}]},
)
KNOWN = task_info(PROMPTS, (3, 16, 16), RULES)


def eight_bits() -> list[Image.Image]:
    levels = SAMPLES.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in levels]


def expected(kit: str) -> torch.Tensor:
    """What the stand-in of a kit makes of the samples, worked here by hand."""
    bright = torch.tensor([light(image) for image in eight_bits()])
    letters = torch.tensor([float(len(PROMPTS[i])) for i in LABEL])
    return {
        "image_reward": bright + letters,
        "hpsv3": bright + letters,
        "hpsv3, older": bright + letters,
        "unified_reward": (bright + 0.1 * letters) / 4,
        "deqa": bright,
        "safety": -bright,
        "lpips_likeness": -(SAMPLES - 1).abs().mean((1, 2, 3)),
        "object_checks": torch.tensor([0.0, 1.0, 0.0, 0.0, float(bright[4] > 0.5)]),
    }[kit]


@pytest.fixture
def white(tmp_path):
    Image.new("RGB", (16, 16), "white").save(tmp_path / "white.png")
    return str(tmp_path / "white.png")


def options(kit: str, white: str) -> dict:
    return {"lpips_likeness": {"reference": white}}.get(kit, {"device": "cpu"})


@pytest.fixture(params=PACKAGES)
def made(request, white):
    """Each kit by its stand-in, and what it shall answer."""
    with installed(PACKAGES[request.param]()):
        name = request.param.partition(",")[0]
        reward = KITS[name].reward
        yield build(reward, {reward: options(name, white)}, KNOWN), expected(request.param), name


def close(found, wanted) -> None:
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=2e-3)


def test_every_folder_is_a_kit_and_says_what_it_is():
    from importlib.resources import files

    folders = {f.name for f in files("rlfusion.rewards.kit").iterdir() if f.is_dir() and f.name != "__pycache__"}
    assert folders == KITS.keys()
    for kit in KITS.values():
        pins = kit.requirements.split()
        assert all(re.fullmatch(r"[\w-]+==[\w.]+", pin) for pin in pins)
        assert "torch==2.6.0" in pins
        assert kit.licence
        assert kit.interface


def test_a_kit_scores_by_the_published_signature(made):
    reward, wanted, _ = made
    close(score(reward, SAMPLES, LABEL, "it"), wanted)
    two = torch.tensor([3, 1])
    close(score(reward, SAMPLES[two], LABEL[two], "it"), wanted[two])


def test_a_served_kit_gives_the_same(made, white):
    reward, _, name = made
    offer = make_service(Serve(KITS[name].reward, options(name, white), device="cpu")).offer
    with serving(None, wants=offer.wants, make=lambda info: offer.reward(info)[0]) as url:
        told = {"prompts": PROMPTS, "shape": (3, 16, 16), "classes": 3, "metadata": RULES}
        remote = client(url, **told)
        assert torch.equal(remote(SAMPLES, LABEL), reward(SAMPLES, LABEL))


SHORT = (
    "connection reset",
    "HTTP 503",
    "truncated frame",
    "garbage",
    "values missing",
    "another question",
    "a flipped bit",
)


def test_a_kit_s_server_that_is_killed_or_answers_nonsense_is_asked_again(made):
    reward, wanted, _ = made
    with Faulty(reward, *(FAULTS[fault] for fault in SHORT)) as one:
        remote = client(one.url, patience_s=60.0)
        remote.replicas.most_s = 0.02
        close(remote(SAMPLES, LABEL), wanted)
        assert one.questions == len(SHORT) + 1


def test_a_kit_s_server_that_is_slow_is_named_or_another_answers(made):
    reward, wanted, _ = made
    with Faulty(reward, FAULTS["hang"], always=True) as slow, Faulty(reward) as good:
        with pytest.raises(RewardFailure, match=r"no whole answer within 0\.2 s"):
            client(slow.url, timeout_s=0.2)(SAMPLES, LABEL)
        close(client(slow.url, good.url, timeout_s=0.5, patience_s=20.0)(SAMPLES, LABEL), wanted)


@pytest.mark.parametrize("kit", KITS)
def test_a_kit_s_server_of_another_protocol_is_refused(kit):
    class Other(Faulty):
        def _answer(self, path, body):
            return http(encode(asdict(Served(KITS[kit].reward, IDENTITY, False, 10**6, PROTOCOL + 1))))

    with Other(None) as one, pytest.raises(ConfigError, match=rf"protocol.*{PROTOCOL + 1}|{PROTOCOL + 1}.*protocol"):
        client(one.url)(SAMPLES, LABEL)


class Broken:
    """A stand-in's answer, changed."""

    def __init__(self, change):
        self.change = change

    def __call__(self, *args, **named):
        return self.change


WRONG = {
    "image_reward": ("score", float("nan"), "is not finite"),
    "hpsv3": ("reward", [torch.zeros(3)] * 5, r"answered \(5, 3\): expected \(5, 2\)"),
    "deqa": ("score", torch.zeros(4), "answered 4 scores: expected 5"),
    "lpips_likeness": ("forward", torch.full((5, 1, 1, 1), torch.nan), "is not finite"),
}


@pytest.mark.parametrize("kit", WRONG)
def test_nan_and_other_shapes_of_a_kit_are_errors(kit, white, monkeypatch):
    what, answer, said = WRONG[kit]
    with installed(PACKAGES[kit]()):
        reward = KITS[kit].reward
        built = build(reward, {reward: options(kit, white)}, KNOWN)
        model = built.distance if kit == "lpips_likeness" else built.model
        monkeypatch.setattr(type(model), what, lambda self, *a, prompt=0, image=0, **k: answer, raising=True)
        if kit == "hpsv3":
            monkeypatch.setattr(type(model), what, lambda self, prompts, image_paths: answer)
        if kit == "deqa":
            monkeypatch.setattr(type(model), what, lambda self, images: answer)
        if kit == "lpips_likeness":
            monkeypatch.setattr(type(model), what, lambda self, in0, in1: answer)
        if kit == "image_reward":
            monkeypatch.setattr(type(model), what, lambda self, prompt, image: answer)
        with pytest.raises(RewardError, match=said):
            score(built, SAMPLES, LABEL, "it")


@pytest.mark.parametrize(
    ("answer", "fine"),
    [
        ("Final Score: 3", True),
        ("**Final Score:** 1", True),
        ("Final Score: **4.5**", True),
        ("Final Score: 7", False),
        ("I give 3 of 5", False),
        ("", False),
    ],
)
def test_an_answer_of_a_judge_without_a_score_is_a_failure_and_no_number(answer, fine):
    with installed(unified_reward(answer)):
        reward = KITS["unified_reward"].reward
        built = build(reward, {reward: {"device": "cpu"}}, KNOWN)
        if fine:
            assert built(SAMPLES, LABEL).isfinite().all()
            return
        with pytest.raises(RewardFailure, match="no score from 1 to 5"):
            built(SAMPLES, LABEL)


def test_arguments_are_bound_by_name_or_not_at_all():
    assert by_name("it", lambda b, a, c=3: (a, b, c), {("a", "x"): 1, ("b",): 2}) == (1, 2, 3)
    with pytest.raises(ConfigError, match=r"has none of a, x: expected the version of it/requirements\.txt"):
        by_name("it", lambda b: b, {("a", "x"): 1})
    with pytest.raises(ConfigError, match="has a and x beside each other"):
        by_name("it", lambda a, x: a, {("a", "x"): 1})
    with pytest.raises(ConfigError, match="wants c as well"):
        by_name("it", lambda a, c: a, {("a",): 1})


@pytest.mark.parametrize("kit", KITS)
def test_a_kit_whose_package_is_missing_says_what_to_do(kit, white, monkeypatch):
    for name in ("ImageReward", "hpsv3", "transformers", "lpips"):
        monkeypatch.setitem(sys.modules, name, None)
    reward = KITS[kit].reward
    with pytest.raises(ConfigError, match=f"expected rlfusion rewards install {kit}"):
        build(reward, {reward: options(kit, white)}, KNOWN)


def test_options_of_kits_that_cannot_be_are_refused(white):
    with installed(PACKAGES["safety"]()):
        reward = KITS["safety"].reward
        for given, said in (
            ({"unsafe": "porn"}, "a class of .*normal, nsfw"),
            ({"threshold": 1.0}, "0 <= threshold < 1"),
        ):
            with pytest.raises(ConfigError, match=said):
                build(reward, {reward: {"device": "cpu", **given}}, KNOWN)
        held = build(reward, {reward: {"device": "cpu", "threshold": 0.4}}, KNOWN)(SAMPLES, LABEL)
        assert (held == 0).tolist() == [light(image) < 0.4 for image in eight_bits()]
    with installed(PACKAGES["lpips_likeness"]()):
        reward = KITS["lpips_likeness"].reward
        with pytest.raises(ConfigError, match="3 of 3 prompts have no reference"):
            build(reward, None, KNOWN)
        with pytest.raises(ConfigError, match="is no image that can be read"):
            build(reward, {reward: {"reference": __file__}}, KNOWN)


def test_what_was_run_of_the_kits_is_of_their_pins():
    record = json.loads((ROOT / "benchmarks" / "results" / "kits.json").read_text())
    page = (ROOT / "docs" / "rewards.md").read_text()
    for name, run in record.items():
        assert run["versions"] == dict(line.split("==") for line in KITS[name].requirements.split()), name
        assert run["check-reward"] == 0
        assert any(line.startswith(f"| `{name}` | {run['versions']['torch']}, ") for line in page.splitlines()), name


# --- LPIPS, for real ---


def test_likeness_is_the_distance_of_the_authors_own_package(tmp_path):
    file, theirs = random_backbone(tmp_path)
    Image.fromarray((torch.rand(64, 64, 3) * 255).to(torch.uint8).numpy()).save(tmp_path / "it.png")
    reward = KITS["lpips_likeness"].reward
    rows = [{"reference": str(tmp_path / "it.png")}] * 2
    built = build(reward, {reward: {"net": NET, "weights": str(file)}}, task_info(("a", "b"), (3, 64, 64), rows))
    x = torch.rand(3, 3, 64, 64, requires_grad=True)
    found = score(built, x, torch.tensor([0, 1, 0]), "it")
    held = torch.from_numpy(np.array(Image.open(tmp_path / "it.png"))).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        wanted = -theirs(x * 2 - 1, held.expand(3, -1, -1, -1) * 2 - 1).flatten()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert (wanted < 0).all()
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()
    assert gradient.any()
    (tmp_path / "other.pth").write_bytes(b"x")
    with pytest.raises(ConfigError, match="does not hold the weights of this backbone"):
        build(
            reward,
            {reward: {"net": NET, "weights": str(tmp_path / "other.pth")}},
            task_info(("a",), (3, 64, 64), rows[:1]),
        )


# --- GenEval's rules ---


def at(x: float, y: float, size: float = 10.0, score: float = 0.95) -> Found:
    return Found((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (at(0, 0), at(50, 0), {"left of"}),
        (at(50, 0), at(0, 0), {"right of"}),
        (at(0, 0), at(0, 50), {"above"}),
        (at(0, 50), at(0, 0), {"below"}),
        (at(0, 0), at(50, 50), {"left of", "above"}),
        (at(0, 0), at(1.9, 0), set()),
        (at(0, 0), at(0, 0), set()),
        (at(0, 0), at(3.9, 0), set()),  # 1.9 of 3.9 beyond what overlap allows: not half
        (at(0, 0), at(4.1, 0), {"left of"}),
    ],
)
def test_where_an_object_is_seen_from_another(a, b, said):
    assert relations(a, b) == said


def test_what_must_and_must_not_be_there():
    def met_by(row, objects, colors=lambda some, name: ["red"] * len(some)):
        return met(row, objects, colors)

    dogs = {"dog": [at(0, 0), at(50, 0, score=0.5), at(90, 0, score=0.2)]}
    two = {"include": [{"class": "dog", "count": 2}]}
    assert met_by(two, dogs) == [True]
    assert met_by({**two, "tag": "counting"}, dogs) == [False]
    assert met_by({"include": [{"class": "dog", "count": 3}]}, dogs) == [False]
    assert met_by({**two, "exclude": [{"class": "dog", "count": 3}]}, dogs) == [True, True]
    assert met_by({**two, "exclude": [{"class": "dog", "count": 2}]}, dogs) == [True, False]
    red = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    assert met_by(red, dogs) == [True]
    assert met_by(red, dogs, lambda some, name: ["blue"]) == [False]
    beside = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}]}
    assert met_by(beside, {**dogs, "cat": [at(-50, 0)]}) == [True, True]
    assert met_by(beside, {**dogs, "cat": [at(50, 0)]}) == [True, False]
    assert met_by(beside, {"cat": [at(-50, 0)]}) == [False, False]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "a prompt without GenEval's metadata"),
        ({"include": []}, "a prompt without GenEval's metadata"),
        ({"include": [{"class": "bench"}]}, "expected {class: a name, count: 1 at least}"),
        ({"include": [{"class": "bench", "count": 0}]}, "expected {class: a name, count: 1 at least}"),
        ({"include": [{"class": "clok", "count": 1}]}, "did you mean 'clock'"),
        ({"include": [{"class": "bench", "count": 1, "color": "mauve"}]}, "color 'mauve': expected one of red"),
        ({"include": [{"class": "bench", "count": 1, "position": ["left of", 0]}]}, "the number of an entry before"),
        ({"include": [{"class": "bench", "count": 1, "position": ["near", 0]}]}, "one of left of, right of"),
    ],
)
def test_rules_that_cannot_be_checked_are_refused(row, said):
    reward = KITS["object_checks"].reward
    with installed(PACKAGES["object_checks"]()), pytest.raises(ConfigError, match=said):
        build(reward, {reward: {"device": "cpu"}}, task_info(("a",), (3, 16, 16), ({"tag": "x", **row},)))


def test_colours_are_those_of_the_object_and_not_of_what_is_beside_it():
    rules = ({"include": [{"class": "bench", "count": 1, "color": "red"}, {"class": "clock", "count": 1}]},)
    reward = KITS["object_checks"].reward
    x = torch.ones(3, 3, 8, 8)
    x[0, 1:, :, :4] = 0.2  # the left half, the bench, is red
    x[1, 1:, :, 4:] = 0.2  # the right half is: the clock
    x[2] = 0.2  # all is grey, and no clock
    with installed(PACKAGES["object_checks"]()):
        for strict, wanted in (True, [1, 0, 0]), (False, [1, 0.5, 0]):
            given = {reward: {"device": "cpu", "strict": strict}}
            built = build(reward, given, task_info(("a",), (3, 8, 8), rules))
            assert built(x, torch.zeros(3, dtype=torch.int64)).tolist() == wanted


# --- environments ---


@pytest.fixture
def envs(tmp_path, monkeypatch):
    monkeypatch.setenv(reward_kits.VARIABLE, str(tmp_path / "envs"))
    return tmp_path / "envs"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(envs, capsys):
    assert main(["rewards", "install", "hpsv3", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "licence: MIT" in said
    assert f"-r {envs / 'hpsv3' / 'requirements.txt'}" in said
    assert "rlfusion-" in said
    assert not envs.exists()
    assert main(["rewards"]) == 0
    cells = [[cell.strip() for cell in line.split("│")[1:3]] for line in capsys.readouterr().out.splitlines()]
    assert {held[0]: held[1] for held in cells if len(held) == 2 and held[0]} == dict.fromkeys(KITS, "not installed")


@pytest.mark.parametrize("uv", [True, False])
def test_an_environment_is_made_served_and_noticed_when_it_is_outdated(envs, monkeypatch, capsys, uv):
    run: list[list[str]] = []

    def made(command, name, folder):
        run.append(list(command))
        made_by = envs / name / "bin"
        made_by.mkdir(exist_ok=True)
        (made_by / "python").touch()
        if fails and len(run) == 2:
            raise reward_kits.KitUnavailable("no network")

    monkeypatch.setattr(reward_kits, "_run", made)
    monkeypatch.setattr(reward_kits.shutil, "which", lambda name: "/uv" if uv else None)
    fails = True
    assert main(["rewards", "install", "safety"]) == 69
    assert reward_kits.Environment.of("safety").state == "not installed"
    assert main(["rewards", "serve", "safety"]) == 2
    assert "is not installed: expected rlfusion rewards install safety" in capsys.readouterr().err
    fails, run[:] = False, []
    assert main(["rewards", "install", "safety"]) == 0
    assert [command[0] for command in run] == (
        ["/uv", "/uv"] if uv else [sys.executable, str(envs / "safety/bin/python")]
    )
    wheel = next((envs / "safety").glob("rlfusion-*.whl"))
    assert run[1][-1] == f"{wheel}[serve]"
    found = reward_kits.serving("safety", ["--port", "0"])
    assert found[1:] == ["-I", "-m", "rlfusion", "serve-reward", KITS["safety"].reward, "--port", "0"]
    assert found[0] == str(envs / "safety" / "bin" / "python")
    capsys.readouterr()
    assert main(["rewards", "install", "safety"]) == 0
    assert "safety is installed in" in capsys.readouterr().out
    assert len(run) == 2
    stamp = json.loads((envs / "safety" / "kit.json").read_text())
    (envs / "safety" / "kit.json").write_text(json.dumps(stamp | {"requirements": "0"}))
    assert reward_kits.Environment.of("safety").state == "outdated"
    assert main(["rewards", "serve", "safety"]) == 2


def test_the_wheel_of_a_kit_is_one_that_pip_knows(tmp_path):
    blob = reward_kits._wheel()
    assert blob == reward_kits._wheel()
    file = tmp_path / reward_kits._wheel_name()
    file.write_bytes(blob)
    from zipfile import ZipFile

    names = ZipFile(file).namelist()
    assert "rlfusion/rewards/kit/deqa/requirements.txt" in names
    assert any(name.endswith(".dist-info/RECORD") for name in names)


def test_what_is_said_wrongly_is_refused(envs, capsys):
    envs.mkdir()
    (envs / "deqa").mkdir()
    (envs / "deqa" / "requirements.txt").write_text("numpy")  # of somebody's own project
    for words, said in {
        ("instal", "deqa"): "did you mean 'install'",
        ("install",): "expected the name of a kit",
        ("install", "dequa"): "did you mean 'deqa'",
        ("install", "deqa", "--dry"): "did you mean '--dry_run'",
        ("serve", "image_rewards"): "did you mean 'image_reward'",
        ("list", "deqa"): "expected no name",
        ("install", "deqa"): "holds other things than an environment of a kit",
    }.items():
        assert main(["rewards", *words]) == 2
        assert said in capsys.readouterr().err
    assert (envs / "deqa" / "requirements.txt").read_text() == "numpy"
    assert main(["rewards", "show", "deqa"]) == 0
    assert "transformers==4.36.1" in capsys.readouterr().out


def test_an_installer_that_fails_is_named_with_what_it_said(tmp_path):
    failing = [sys.executable, "-c", "import sys; sys.exit('no such package')"]
    with pytest.raises(reward_kits.KitUnavailable, match="ended with 1: no such package"):
        reward_kits._run(failing, "it", tmp_path)
    told = "import os; open('here', 'w').write(os.getcwd())"
    reward_kits._run([sys.executable, "-c", told], "it", tmp_path)
    assert (tmp_path / "here").read_text() == str(tmp_path.resolve())
    with pytest.raises(reward_kits.KitUnavailable, match="cannot be installed: nowhere"):
        reward_kits._run(["nowhere"], "it", tmp_path)
    assert subprocess.run([sys.executable, "-c", ""], check=False).returncode == 0
