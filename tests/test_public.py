"""The public face, ``import rlfusion as rlf``: its names, and what its functions do beside the command line's."""

import ast
import json
import os
import signal
from pathlib import Path

import gymnasium
import pytest
import torch
from PIL import Image
from processes import rlfusion
from safetensors.torch import load_file
from tiny_pipelines import MAKERS
from tiny_runs import TINY

import rlfusion as rlf
from rlfusion.common import stops

SOURCE = Path(rlf.__file__)
TINIEST = {"chain": {"steps": 3}, "rollout": {"prompts": 2, "samples_per_prompt": 4}}


class Net(torch.nn.Module):
    """A network that the library has never heard of, for samples (1, 2, 2)."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.SiLU(), torch.nn.Linear(32, 4))

    def forward(self, x, t, cond):
        return self.layers(torch.cat([x.flatten(1), t[:, None]], 1)).view_as(x)


def bright(samples, cond):
    return samples.mean((1, 2, 3))


def own(classes=2, **chain):
    denoiser = rlf.Denoiser(Net(), rlf.Cosine(), "x0")
    return rlf.Model.of(denoiser, (1, 2, 2), classes, {"steps": 3, "last_noise": 0.1, **chain})


def weights(model):
    return {name: value.clone() for name, value in model.denoiser.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", rlf.__all__)
def test_a_public_name_is_there_and_says_what_it_is(name):
    assert name in dir(rlf)
    found = getattr(rlf, name)
    if name != "__version__":
        assert found.__doc__
        assert not name.startswith("_")


def test_what_a_type_checker_sees_is_what_is_loaded():
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If) and not node.orelse
                 and isinstance(node.test, ast.Name))  # fmt: skip
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == rlf._HOMES


def test_no_public_name_is_a_room():
    rooms = {path.name for folder in rlf.__path__ for path in Path(folder).iterdir() if path.is_dir()}
    assert not rooms & set(rlf.__all__)


def test_an_unknown_name_is_an_attribute_error_as_pythons_own():
    with pytest.raises(AttributeError, match="no attribute 'finetun'") as refused:
        _ = rlf.finetun
    assert (refused.value.name, refused.value.obj) == ("finetun", rlf)  # of which Python makes its "Did you mean"


@pytest.mark.parametrize("path", ["first", Path("first"), "first/model"])
def test_load_takes_texts_and_paths_and_gives_the_saved_chain(tiny_root, path):
    model = rlf.load(tiny_root / path if isinstance(path, Path) else f"{tiny_root}/{path}")
    assert model.chain.steps == 4
    assert model.times.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert isinstance(model.policy, rlf.Policy)
    assert (model.shape, model.names) == ((1, 8, 8), tuple("0123456789"))
    assert same(weights(model), load_file(tiny_root / "first" / "model" / "weights.safetensors"))


def test_load_changes_what_it_is_told_of_the_chain(tiny_root):
    model = rlf.load(tiny_root / "first", chain={"steps": 2, "kernel": "DDIM(eta=0.0)"}, device="cpu")
    assert model.policy.kernel == rlf.DDIM(eta=0.0)
    assert len(model.times) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"chain": {"stepz": 2}}, "did you mean 'steps'"),
        ({"chain": {"steps": "2"}}, "steps = '2' of chain: expected int"),
        ({"prompts": "a cat"}, "no pretrained pipeline"),
        ({"pipeline": {"size": 8}}, "no pretrained pipeline"),
        ({"device": "gpu"}, "did you mean 'cuda'"),
    ],
)
def test_load_refuses_what_it_would_not_use(tiny_root, settings, said):
    with pytest.raises(rlf.ConfigError, match=said):
        rlf.load(tiny_root / "first", **settings)


def test_a_pipeline_is_loaded_with_its_prompts_and_sampled(tmp_path):
    MAKERS["sd"]().save_pretrained(tmp_path / "sd")
    model = rlf.load(str(tmp_path / "sd"), prompts=["a red cat", "a green cat"], chain={"steps": 2})
    assert model.names == ("a red cat", "a green cat")
    samples = rlf.sample(model, "a green cat", seed=1)
    assert samples.shape == (1, *model.shape)
    assert 0 <= float(samples.min()) <= float(samples.max()) <= 1
    with pytest.raises(rlf.ConfigError, match=r"unknown label 'a green cow'.*'a green cat'"):
        rlf.sample(model, "a green cow")


def test_sample_draws_what_the_command_draws(tiny_root, tmp_path):
    picture = tmp_path / "it.png"
    told = ("sample", "--checkpoint", tiny_root / "first", "--out", picture, "--count", 10, "--scale", 1, "--seed", 3)
    assert rlfusion(tmp_path, *told).code == 0
    samples = rlf.sample(str(tiny_root / "first"), seed=3, count=10)
    assert samples.shape == (10, 1, 8, 8)
    drawn = torch.tensor(list(Image.open(picture).convert("L").tobytes())).reshape(Image.open(picture).size[::-1])
    ours = (samples * 255).round().to(drawn.dtype)
    assert all(bool((drawn.unfold(0, 8, 1).unfold(1, 8, 1) == one[0]).all(-1).all(-1).any()) for one in ours)


def test_a_sample_depends_on_seed_place_and_label_alone(tiny_root):
    model = rlf.load(tiny_root / "first")
    every = rlf.sample(model, seed=0)
    assert len(every) == 10
    some = rlf.sample(model, ["0", 1, "2"], seed=0)
    torch.testing.assert_close(some, every[:3])
    assert not torch.equal(rlf.sample(model, seed=1), every)
    assert not torch.allclose(rlf.sample(model, 5, count=3, seed=0), every[:3])
    torch.testing.assert_close(rlf.sample(model, torch.arange(10), seed=0), every)
    assert not torch.allclose(rlf.sample(model, chain={"steps": 2}), every)
    assert model.chain.steps == 4


@pytest.mark.parametrize(
    ("labels", "settings", "said"),
    [
        ("eleven", {}, "unknown label 'eleven'"),
        (10, {}, r"whole number in 0..9"),
        (-1, {}, r"whole number in 0..9"),
        (True, {}, r"whole number in 0..9"),
        ([], {}, "one at least"),
        (0.5, {}, r"label 0.5: .* whole number in 0..9"),
        (torch.ones(2), {}, r"whole number in 0..9"),
        (None, {"count": 0}, "count = 0"),
        (None, {"count": 2.0}, "count = 2.0"),
    ],
)
def test_labels_that_are_none_are_refused(tiny_root, labels, settings, said):
    with pytest.raises(rlf.ConfigError, match=said):
        rlf.sample(tiny_root / "first", labels, **settings)


def test_evaluate_measures_what_the_command_measures(tiny_root, tmp_path):
    told = ("--checkpoint", tiny_root / "first", "--root", tiny_root, "--evaluation.samples", 60, "--reward", "ink")
    assert rlfusion(tmp_path, "evaluate", *told, "--out", "it.json").code == 0
    there = rlf.evaluate(tiny_root / "first", "ink", samples=60, data="digits", root=tiny_root)
    assert there == json.loads((tmp_path / "it.json").read_text())
    plain = rlf.evaluate(tiny_root / "first", bright, samples=60)
    assert plain["reward"] == pytest.approx(there["reward"])
    assert "frechet" not in plain


def test_evaluate_measures_few_samples_by_what_they_can_carry(tiny_root):
    one = rlf.evaluate(tiny_root / "first", bright, samples=1, data="digits", root=tiny_root)
    assert one["count"] == 1
    assert {"reward", "agreement", "brightness"} <= one.keys()
    assert not {"frechet", "precision", "recall", "diversity"} & one.keys()
    two = rlf.evaluate(tiny_root / "first", bright, samples=2, data="digits", root=tiny_root)
    assert "frechet" in two
    assert "diversity" not in rlf.evaluate(tiny_root / "first", bright, samples=3)
    with pytest.raises(rlf.ConfigError, match="samples = 0: expected at least 1"):
        rlf.evaluate(tiny_root / "first", bright, samples=0)


def test_evaluate_refuses_data_of_another_model():
    with pytest.raises(rlf.ConfigError, match="the model's"):
        rlf.evaluate(own(), data="digits")


@pytest.mark.parametrize("agent", ["grpo", "dpo"])
def test_finetune_gives_the_weights_of_the_command(tiny_root, tmp_path, agent):
    told = ["--root", tiny_root, "--name", f"public-{agent}", "--base", tiny_root / "first", "--reward", "ink"]
    told += ["--updates", 3, "--rollout.prompts", 4, "--rollout.samples_per_prompt", 6, "--monitor.every", 0]
    told += ["--agent", agent, "--agent.lr", 0.002, "--evaluation.samples", 50, "--seed", 5]
    result = rlfusion(tmp_path, "finetune", *told)
    assert result.code == 0, result.err
    few = {"prompts": 4, "samples_per_prompt": 6}
    run = rlf.finetune(
        *(tiny_root / "first", "ink"),
        agent={"name": agent, "lr": 0.002},
        updates=3,
        seed=5,
        rollout=few,
        root=tiny_root,
    )
    metrics = list(run)
    folder = tiny_root / f"public-{agent}"
    assert same(weights(run.model), load_file(folder / "model" / "weights.safetensors"))
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in logged if any(name.startswith("train/") for name in line)]
    assert [m["reward"] for m in metrics] == [line["train/reward"] for line in logged]
    rlf.save(run.model, tmp_path / "saved")
    for name in ("weights.safetensors", "model.json"):
        assert (tmp_path / "saved" / name).read_bytes() == (folder / "model" / name).read_bytes()


def test_finetune_without_a_model_is_the_command_without_a_base(tiny_root):
    pairs = {str(TINY[i])[2:]: TINY[i + 1] for i in range(0, len(TINY), 2)}
    kept = {name: value for name, value in pairs.items() if not name.startswith("evaluation")}
    run = rlf.finetune(root=tiny_root, **kept)
    assert sum(1 for _ in run) == 6
    assert same(weights(run.model), load_file(tiny_root / "first" / "model" / "weights.safetensors"))


def test_own_network_own_reward_own_loop():
    model = own(1)
    before = weights(model)
    run = rlf.finetune(model, bright, agent="grpo", updates=8, rollout={"prompts": 4, "samples_per_prompt": 12})
    rewards = []
    for metrics in run:
        rewards.append(metrics["reward"])
    assert rewards[-1] > rewards[0] + 0.02
    assert (run.updates, run.queries) == (8, 8 * 48)
    assert same(weights(model), before)
    assert not same(weights(run.model), before)
    assert rlf.evaluate(run.model, bright, samples=60)["reward"] > rlf.evaluate(model, bright, samples=60)["reward"]


def test_a_loop_may_be_left_and_taken_up_again():
    whole = rlf.finetune(own(), bright, agent="grpo", updates=3, **TINIEST)
    list(whole)
    parts = rlf.finetune(own(), bright, agent="grpo", updates=3, **TINIEST)
    for _ in parts:
        break
    assert parts.updates == 1
    assert len(list(parts)) == 2
    assert same(weights(whole.model), weights(parts.model))
    assert list(parts) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("agent", ["grpo", "draft"])
def test_what_stops_an_update_undoes_it_and_the_next_begins_it_again(error, agent):
    calls = []

    def reward(samples, cond):
        calls.append(0)
        if len(calls) == stop:
            raise error
        return samples.mean((1, 2, 3))

    stop = 0
    whole = rlf.finetune(own(), reward, agent=agent, updates=3, **TINIEST)
    list(whole)
    stop, most = len(calls) - 1, len(calls)
    calls.clear()
    broken = rlf.finetune(own(), reward, agent=agent, updates=3, **TINIEST)
    with pytest.raises((error, rlf.UserCodeError)):
        list(broken)
    assert len(calls) == stop < most
    list(broken)
    assert broken.updates == 3
    assert same(weights(whole.model), weights(broken.model))


def test_no_handler_is_installed_and_no_file_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, threads = {number: signal.getsignal(number) for number in stops.CODES}, torch.get_num_threads()
    run = rlf.finetune(own(), bright, agent="grpo", updates=1, **TINIEST)
    for _ in run:
        assert {number: signal.getsignal(number) for number in stops.CODES} == before
    rlf.sample(run.model)
    rlf.evaluate(run.model, bright, samples=50)
    rlf.make_env(run.model, bright)
    assert os.listdir(tmp_path) == []
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"updates": 0}, "updates = 0"),
        ({"updats": 3}, "did you mean 'updates'"),
        ({"agent": "grop"}, "did you mean 'grpo'"),
        ({"agent": {"name": "grpo", "lr": "x"}}, "agent.lr = x"),
        ({"agent": {"name": "grpo", "lrr": 1}}, "agent.lrr"),
        ({"agent.name": "grpo"}, "expected agent='grpo'"),
        ({"chain": {"stepz": 1}}, "did you mean 'chain.steps'"),
        ({"rollout": {"workers": 2}}, "rollout.workers belongs to a run in a folder"),
        ({"rollout": 5}, "rollout"),
        ({"monitor": {"every": 1}}, "belongs to a run in a folder"),
        ({"evaluation.every": 1}, "belongs to a run in a folder"),
        ({"threads": 2}, "belongs to a run in a folder"),
        ({"budget_queries": 9}, "belongs to a run in a folder"),
        ({"resume": "runs/x"}, "word of the command line"),
        ({"config": "x.yaml"}, "word of the command line"),
        ({"root": "x"}, "beside a model"),
        ({"pretrain": {"data": "digits"}}, "beside a model"),
        ({"lora": bright}, "expected plain data"),
        ({"reward": "inc"}, "did you mean 'ink'"),
        ({"reward": 3}, "reward = 3"),
        ({"reward": {bright: "much"}}, "'bright' = 'much'"),
        ({"reward": {"bright": 1, bright: 1}}, "given twice"),
        ({"reward": {}}, "expected one reward"),
        ({"reward": lambda a, b: a}, "expected parameters named samples or images"),
        ({"reward": "class_logprob"}, "no data to learn from"),
        ({"reward_options": {"ink": {"x": 1}}}, "'ink'"),
        ({"device": "gpu"}, "did you mean 'cuda'"),
    ],
)
def test_finetune_refuses_in_one_line(settings, said):
    with pytest.raises(rlf.ConfigError, match=said) as refused:
        rlf.finetune(own(), **{"reward": bright, **settings})
    assert "\n" not in str(refused.value)


def test_rewards_are_named_and_given_together_with_options():
    def scaled(samples, cond, *, by=1.0):
        return by * samples.mean((1, 2, 3))

    mixed = {"ink": 1.0, scaled: 0.5}
    run = rlf.finetune(own(), mixed, agent="grpo", updates=1, reward_options={"scaled": {"by": 4.0}}, **TINIEST)
    metrics = next(run)
    assert metrics["reward_scaled"] == pytest.approx(4 * metrics["reward_ink"])
    assert metrics["reward"] == pytest.approx(3 * metrics["reward_ink"])


def test_agents_may_be_settings_objects():
    from rlfusion.agents import grpo

    run = rlf.finetune(own(), bright, agent=grpo.Config(lr=0.003), updates=1, **TINIEST)
    named = rlf.finetune(own(), bright, agent={"name": "grpo", "lr": 0.003}, updates=1, **TINIEST)
    assert next(run) == next(named)
    assert same(weights(run.model), weights(named.model))


NET = """
import torch

class Linear(torch.nn.Module):
    def __init__(self, shape, classes, width=3):
        super().__init__()
        self.shape, self.inner, self.outer = shape, torch.nn.Linear(4, width), torch.nn.Linear(width, 4)

    def forward(self, x, t, cond):
        return self.outer(self.inner(x.flatten(1))).view_as(x)
"""


def test_a_network_of_ones_own_is_saved_by_the_name_that_makes_it_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NET)
    exec(NET, made := {})
    denoiser = rlf.Denoiser(made["Linear"]((1, 2, 2), 1), rlf.Cosine(), "x0")
    model = rlf.Model.of(denoiser, (1, 2, 2), net="nets.py:Linear(width=3)", chain={"steps": 3})
    run = rlf.finetune(model, bright, agent="nft", updates=1, **TINIEST)
    next(run)
    rlf.save(run.model, "saved")
    again = rlf.load("saved")
    assert same(weights(again), weights(run.model))
    torch.testing.assert_close(rlf.sample(again, count=3), rlf.sample(run.model, count=3))


@pytest.mark.parametrize(
    ("net", "said"),
    [("", "no name by which it is found"), ("nets.py:Linear(width=4)", "inner.*is not that of the model")],
)
def test_a_network_of_ones_own_is_not_saved_as_what_nobody_could_load(tmp_path, monkeypatch, net, said):
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NET)
    exec(NET, made := {})
    denoiser = rlf.Denoiser(made["Linear"]((1, 2, 2), 1), rlf.Cosine(), "x0")
    with pytest.raises(rlf.ConfigError, match=said):
        rlf.save(rlf.Model.of(denoiser, (1, 2, 2), net=net), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_make_env_is_the_models_chain(tiny_root):
    model = rlf.load(tiny_root / "first")
    env = rlf.make_env(model, bright, action="noise")
    assert isinstance(env, gymnasium.Env)
    obs, _ = env.reset(seed=0)
    assert obs["x"].shape == (1, 8, 8)
    steps, ended = 0, False
    while not ended:
        obs, reward, ended, _, info = env.step(env.action_space.sample())
        steps += 1
    assert steps == 4
    assert reward == pytest.approx(float(info["sample"].mean()))


def test_make_env_makes_a_batch_and_needs_no_model():
    envs = rlf.make_env(None, "ink", 3, backend="torch")
    obs, _ = envs.reset(seed=0)
    assert obs.x.shape == (3, 1, 8, 8)
    assert rlf.make_env().action_space.shape == (1, 8, 8)
    with pytest.raises(rlf.ConfigError, match="did you mean 'action'"):
        rlf.make_env(acton="noise")
    with pytest.raises(rlf.ConfigError, match="num_envs"):
        rlf.make_env(None, "ink", 0)
