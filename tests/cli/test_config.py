"""Settings: written and read back without loss, and every bad one refused in one line before any work."""

import os
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import yaml

from rlfusion import config, models, pretrain
from rlfusion.agents import ddpo
from rlfusion.cli import main
from rlfusion.cli.arguments import parse as arguments_of
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import MOST_CHARACTERS
from rlfusion.common.errors import ConfigError

FAR = {
    "finetune": config.Finetune(
        root="a b",
        name="n: x",
        seed=2**40,
        reward={"ink": 1.0, "jpeg_compressibility": -0.25},
        reward_options={"jpeg_compressibility": {"quality": 80}},
        pretrain=config.Base(train=pretrain.Config(lr=1e-5, label_noise=1.0), model=models.Config(kind="v")),
        chain=config.Chain(steps=7, kernel="DDPM(variance='large')", guidance=1.5),
        rollout=config.Rollout(workers=2, lag=3),
        ray=config.Ray(gpus_per_worker=0.25),
        agent=ddpo.Config(epochs=3, dual_clip=None, clip=1e-4, advantage="group", kl_reward=3e-7),
    ),
    "pretrain": config.Pretrain(data="x y.npz", held_out=0.1, train=pretrain.Config(steps=1), device="cpu"),
    "sample": config.Sample(checkpoint="runs/x", label="3", scale=1),
    "evaluate": config.Evaluate(checkpoint="runs/x", reward="package.module:name", out="x.json"),
}
DEFAULT = {
    "finetune": config.Finetune(),
    "pretrain": config.Pretrain(),
    "sample": config.Sample(checkpoint="x"),
    "evaluate": config.Evaluate(checkpoint="x"),
}


def parse(command: str, *arguments: str):
    if command in ("finetune", "pretrain"):
        return settings_of(command, list(arguments))
    return arguments_of(type(DEFAULT[command]), command, list(arguments))


@pytest.mark.parametrize("command", FAR)
@pytest.mark.parametrize("table", [FAR, DEFAULT], ids=["far", "default"])
def test_settings_written_as_yaml_are_read_back_identical(command, table, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(table[command]))
    read = parse(command, "--config", str(file))
    assert read == table[command]
    assert type(read) is type(table[command])
    assert config.to_yaml(read) == file.read_text()


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_no_arguments_are_the_defaults(command):
    assert parse(command) == DEFAULT[command]


def test_an_argument_overrides_the_file_and_leaves_the_rest(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(FAR["finetune"]))
    read = parse("finetune", "--config", str(file), "--agent.lr", "1e-6", "--seed", "5", "--pretrain.train.steps", "9")
    far = FAR["finetune"]
    base = replace(far.pretrain, train=replace(far.pretrain.train, steps=9))
    assert read == replace(far, seed=5, agent=replace(far.agent, lr=1e-6), pretrain=base)


def test_a_file_may_hold_a_part_of_the_settings(tmp_path):
    file = tmp_path / "part.yaml"
    file.write_text("agent: {clip: 0.1}\nupdates: 3\n")
    assert parse("finetune", "--config", str(file)) == config.Finetune(updates=3, agent=ddpo.Config(clip=0.1))


def test_print_config_prints_a_file_that_config_reads(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        parse("finetune", "--chain.steps", "9", "--reward", "ink", "--print_config")
    assert ended.value.code in (0, None)
    file = tmp_path / "printed.yaml"
    file.write_text(capsys.readouterr().out)
    assert parse("finetune", "--config", str(file)) == config.Finetune(chain=config.Chain(steps=9), reward="ink")


def test_two_settings_never_share_a_mutable_default():
    first, second = config.Finetune(), config.Finetune()
    first.reward_options["x"] = {}
    assert second.reward_options == {}


REFUSED = [
    ("finetune --updats 3", ["'updats'", "did you mean 'updates'?"]),
    ("finetune --agent.clp 0.1", ["'agent.clp'", "did you mean 'agent.clip'?"]),
    ("finetune --pretrain.train.stps 3", ["'pretrain.train.stps'", "did you mean 'pretrain.train.steps'?"]),
    ("finetune --ray.limits.item 3", ["'ray.limits.item'", "did you mean 'ray.limits.item_s'?"]),
    ("finetune --agent {clp:_1}", ["'agent.clp'", "did you mean 'agent.clip'?"]),
    ("pretrain --train.step 3", ["'train.step'", "did you mean 'train.steps'?"]),
    ("finetune --updates many", ["updates = many", "expected int"]),
    ("finetune --agent.lr fast", ["agent.lr = fast", "expected float"]),
    ("finetune --agent.lr nan", ["agent.lr = 'nan'", "expected float"]),
    ("finetune --agent.form xx", ["agent.form = xx", "'is'", "'sf'"]),
    ("finetune --agent.clip_per_dim maybe", ["agent.clip_per_dim = maybe", "expected bool"]),
    ("finetune --chain.spacing ledding", ["chain.spacing = ledding", "'leading'"]),
    ("finetune --seed 1.5", ["seed = 1.5", "expected int"]),
    ("finetune --updates 0", ["updates = 0", "> 0"]),
    ("finetune --rollout.workers -1", ["rollout.workers = -1", ">= 0"]),
    ("finetune --pretrain.train.steps 0", ["pretrain.train.steps = 0", "> 0"]),
    ("finetune --pretrain.train.ema Constant(decay=1)", ["decay = 1", "< 1"]),
    ("finetune --pretrain.train.ema Powr(gamma=1)", ["did you mean 'Power'"]),
    ("finetune --pretrain.train.warmup -1", ["pretrain.train.warmup = -1", ">= 0"]),
    ("finetune --pretrain.train.label_noise 2", ["pretrain.train.label_noise = 2.0", "[0, 1]"]),
    ("finetune --agent.ema_decay 1.5", ["ema_decay = 1.5", "< 1"]),
    ("finetune --agent.dual_clip 1", ["dual_clip = 1.0", "> 1 + clip"]),
    ("finetune --agent.step_fraction 0", ["agent.step_fraction = 0.0", "<= 1"]),
    ("finetune --agent.updates_per_epoch 500", ["updates_per_epoch = 500", "240 walks"]),
    ("finetune --agent.form sf --rollout.lag 1", ["rollout.lag = 1", "expected 0"]),
    ("finetune --ray.cpus_per_worker -1", ["ray.cpus_per_worker = -1.0", "at least 0"]),
    ("finetune --evaluation.samples 10", ["evaluation.samples = 10", "at least 50"]),
    ("finetune --pretrain.held_out 1", ["pretrain.held_out = 1.0", "(0, 1)"]),
    ("finetune --pretrain.held_out 0.0001", ["held_out = 0.0001", "0 to compare with"]),
    ("finetune --pretrain.held_out 0.9999", ["held_out = 0.9999", "0 for training"]),
    ("finetune --chain.steps 0", ["steps = 0", "at least 1"]),
    ("finetune --chain.kernel DDIM(eta=0)", ["DDIM(eta=0)", "no noise", "eta > 0"]),
    ("finetune --chain.kernel FlowSDE(noise=0)", ["FlowSDE(noise=0)", "noise > 0"]),
    ("finetune --chain.kernel DDIN(eta=1)", ["kernel 'DDIN'", "did you mean 'DDIM'?"]),
    ("finetune --chain.kernel DDIM(etta=1)", ["'etta'", "did you mean 'eta'?"]),
    ("finetune --chain.kernel DDIM(eta='x')", ["eta = x of kernel 'DDIM'", "expected float"]),
    ("finetune --chain.kernel DDIM(eta=3)", ["eta = 3", "eta_max"]),
    ("finetune --chain.spacing leading", ["'leading'", "'trailing'"]),
    ("finetune --pretrain.model.net ResidualMLP(width=-2)", ["width = -2"]),
    ("finetune --pretrain.model.kind epss", ["'epss'", "did you mean 'eps'?"]),
    ("finetune --pretrain.model.schedule Cosin()", ["'Cosin'", "did you mean 'Cosine'?"]),
    ("finetune --reward inkk", ["reward 'inkk'", "did you mean 'ink'?"]),
    ("finetune --reward no.such:thing", ["reward 'no.such:thing'", "no module"]),
    ("finetune --reward_options.class_logprob.weight x", ["'weight'", "did you mean 'weights'?"]),
    ("finetune --reward_options.class_logprob.weights /nope", ["'/nope'", "does not exist"]),
    ("finetune --reward_options.ink.x 1", ["'ink'", "class_logprob"]),
    ("finetune --base /nope", ["'/nope'", "is no model"]),
    ("finetune --pretrain.data /nope", ["'/nope'", "does not exist"]),
    ("finetune --device quantum", ["device = 'quantum'"]),
    ("finetune --resume /nope", ["'/nope'", "config.yaml"]),
    ("finetune --resume=/nope", ["'/nope'", "config.yaml"]),
    ("finetune --resume /nope --seed 1", ["--resume", "nothing else"]),
    ("finetune --config /nope.yaml", ["/nope.yaml"]),
    ("pretrain --held_out 0.9999", ["held_out = 0.9999", "0 for training"]),
    ("pretrain --chain.kernel DDIM(eta=-1)", ["eta = -1"]),
    ("pretrain --chain.kernel DDIM(eta=3)", ["eta = 3", "eta_max"]),
    ("pretrain --chain.kernel Langevin()", ["Langevin", "Geometric()"]),
    ("pretrain --objective flow --chain.kernel ReverseSDE()", ["ReverseSDE", "alpha = 0"]),
    ("pretrain --objective ct --chain.kernel Renoise(floor=0.1)", ["floor = 0.1", "sigma = 0.002"]),
    ("pretrain --objective ncsn --chain.last_noise 0.1", ["last_noise = 0.1", "expected 0"]),
    ("pretrain --chain.guidance 1 --chain.negative nine", ["'nine'", "expected one of"]),
    ("finetune --agent refl --chain.kernel ReverseSDE()", ["ReverseSDE", "alpha = 0"]),
    ("distill --chain.kernel DDIM(eta=3)", ["eta = 3", "eta_max"]),
    ("sample", ["checkpoint"]),
    ("sample --checkpoint /nope", ["'/nope'", "is no model"]),
    ("evaluate --checkpoint /nope", ["'/nope'", "is no model"]),
    ("finetune --device gpu", ["device = 'gpu'", "did you mean 'cuda'?"]),
    ("finetune --device cuda:x", ["device = 'cuda:x'", "cuda:NUMBER"]),
    ("finetune --rollout.prompts 100", ["rollout.prompts = 100", "at most the 10 prompts"]),
    ("finetune --monitor.held_out nope", ["reward 'nope'", "expected one of"]),
    ("finetune --reward {}", ["reward = {}", "one reward at least"]),
    ("finetune --reward_options.class_logprob.weights 3", ["weights = 3 of reward 'class_logprob'", "text"]),
    ("finetune --pretrain.model.net UNet(multipliers=3)", ["multipliers = 3 of network 'UNet'", "a list"]),
    ("finetune --pretrain.model.schedule DDPM(resolution=99999999999)", ["resolution=99999999999", "1e6"]),
    ("finetune --pretrain.train.loss Denoising(weight=3)", ["weight = 3 of pretraining loss", "text"]),
    ("finetune --lora LoRA(targets='nope')", ["target of LoRA 'nope'", "15 names"]),
    (f"finetune --chain.kernel DDIM(eta={'(' * 100_000}", ["characters", "expected Name or Name(setting=value"]),
    (f"finetune --chain.kernel DDIM(eta={'[' * 900}1{']' * 900})", ["expected Name or Name(setting=value"]),
    (f"finetune --reward {'x' * 5000}", ["unknown reward 'xxx"]),
    ("finetune --evaluation.samples 8 --monitor.samples 8", ["monitor.samples = 8", "at least 50"]),
    ("finetune --evaluation.samples 49 --guard.patience 49 --monitor.samples 50", ["evaluation.samples = 49"]),
    ("finetune --pretrain.train.lr 0 --agent.lr 0", [" pretrain.train.lr = 0.0"]),
    ("finetune --threads -1 --rollout.workers -1", [" rollout.workers = -1"]),
    ("compare --vary monitor.samples=8", ["vary monitor.samples = 8"]),
    ("compare --budget_queries 10", ["budget_queries = 10", "expected at least 240"]),
    ("fintune", ["'fintune'", "did you mean 'finetune'?"]),
]


LONG = "x" * 5000
LONG_NAMES = [
    *(f"{c} --base {LONG}" for c in ("finetune", "compare", "doctor")),
    *(f"{c} --model {LONG}" for c in ("finetune", "compare", "check-model", "check-reward ink")),
    *(
        f"{c} --root {LONG}"
        for c in ("finetune", "compare", "pretrain", "pretrain-autoencoder", "train-clip", "distill")
    ),
    *(f"{c} --name {LONG}" for c in ("finetune", "pretrain", "distill")),
    *(f"{c} --config {LONG}.yaml" for c in ("finetune", "evaluate", "serve-reward ink")),
    *(f"{c} --data {LONG}{end}" for c in ("pretrain", "train-clip") for end in ("", ".npz", ".csv", ".parquet")),
    *(f"{c} --reward {LONG}.py:f" for c in ("finetune", "check-reward", "serve-reward")),
    *(f"{c} --checkpoint {LONG}" for c in ("sample", "evaluate")),
    *(f"finetune --{key} {LONG}" for key in ("pretrain.data", "pretrain.autoencoder", "resume", "ray.address")),
    *(f"finetune --{key} {LONG}" for key in ("monitor.held_out", "reward", "agent", "agent.name", "lora", "device")),
    f"finetune --reward_options.class_logprob.weights {LONG}",
    f"finetune --reward a.{LONG}:f",
    f"finetune --reward http://{LONG}:8500",
    f"pretrain --data folder(path='{LONG}')",
    f"pretrain --autoencoder {LONG}",
    f"distill --teacher {LONG}",
    f"compare --rewards {LONG}.py:f",
    f"sample --checkpoint x --out {LONG}.png",
    f"evaluate --checkpoint x --out {LONG}.json",
    f"serve-reward ink --token_file {LONG}",
    f"serve-reward ink --host {LONG}",
]


@pytest.mark.parametrize("line", LONG_NAMES, ids=[line.replace(LONG, "LONG") for line in LONG_NAMES])
def test_a_name_too_long_for_any_file_is_one_short_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert (err.count("\n"), out) == (1, "")
    assert len(err) <= MOST_CHARACTERS + len("rlfusion: \n")
    assert "xxx" in err or "no model" in err
    assert "Errno" not in err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("line", "said"), REFUSED, ids=[line[:80] for line, _ in REFUSED])
def test_a_bad_setting_is_code_2_one_line_and_nothing_done(line, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main([word.replace("_", " ") if word[0] == "{" else word for word in line.split()]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert all(part in err for part in said), err
    assert out == ""
    assert os.listdir(tmp_path) == []


FILES = [
    ({"agnt": {"clip": 1}}, ["'agnt.clip'", "did you mean 'agent.clip'?"]),
    ({"agent": {"clp": 1}}, ["'agent.clp'", "did you mean 'agent.clip'?"]),
    ({"ray": {"limits": {"item_": 3}}}, ["'ray.limits.item_'", "did you mean 'ray.limits.item_s'?"]),
    ({"pretrain": {"train": {"lr": "fast"}}}, ["pretrain.train.lr = fast", "expected float"]),
    ({"pretrain": {"train": {"lr": -1}}}, ["pretrain.train.lr = -1", "> 0"]),
    ({"agent": 5}, ["agent = 5", "mapping"]),
    ({"ray": {"limits": [1]}}, ["ray.limits"]),
    ([3], ["[3]", "mapping"]),
]


@pytest.mark.parametrize(("content", "said"), FILES, ids=[str(content) for content, _ in FILES])
def test_a_bad_setting_in_a_file_is_found_at_any_depth(content, said, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        parse("finetune", "--config", str(file))
    assert all(part in str(caught.value) for part in said), caught.value


def test_every_setting_is_explained():
    """Each field of each settings class has a line in its docstring, which --help shows."""
    for settings in DEFAULT.values():
        for part in [settings, *(v for v in vars(settings).values() if hasattr(v, "__dataclass_fields__"))]:
            for name in (field.name for field in fields(part)):
                assert f"\n        {name}: " in (type(part).__doc__ or ""), f"{type(part).__name__}.{name}"


def test_run_folders_are_never_shared(tmp_path):
    from rlfusion.jobs.runs import new_run

    settings = config.Pretrain(root=str(tmp_path))
    made = []
    for _ in range(3):
        with new_run("pretrain", settings, "x") as held:
            made.append(held)
    assert [folder.name for _, folder in made] == ["x", "x-2", "x-3"]
    for held, folder in made:
        assert parse("pretrain", "--config", str(folder / "config.yaml")) == held == replace(settings, name=folder.name)
    assert asdict(made[0][0])["root"] == str(Path(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "mapping"),
    [
        (["--reward={r.py:score: 1, ink: 2}"], lambda read: read.reward),
        (["--reward=r.py:score", "--reward_options={r.py:score: {a: 1}}"], lambda read: read.reward_options),
        (
            ["--reward=r.py:score", "--ray.reward_envs={r.py:score: {}}", "--rollout.workers=1"],
            lambda read: read.ray.reward_envs,
        ),
    ],
)
def test_a_reward_in_a_file_has_one_name_wherever_a_setting_names_it(arguments, mapping, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path}/r.py:score" in mapping(settings_of("finetune", arguments))


def test_a_reward_in_a_file_is_not_named_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="twice"):
        settings_of("finetune", ["--reward={r.py:score: 1, ./r.py:score: 2}"])
