"""The defaults that agents have of their own on pretrained pipelines."""

import pytest

import rlfusion as rlf
from rlfusion.agents import ddpo, grpo, ppo
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.defaults import for_pipelines
from rlfusion.jobs.finetune.run import unusual

OWN = {
    "ddpo": {"kl_loss": 0.0, "epochs": 1, "clip": 0.01, "clip_per_dim": True, "step_weight": "noise", "pace": 0.1},
    "grpo": {
        **{"kl_loss": 0.0, "epochs": 1, "clip_low": 0.01, "clip_high": 0.01, "clip_per_dim": True},
        **{"step_weight": "noise", "pace": 0.1},
    },
    "ppo": {"kl_loss": 0.0, "epochs": 1, "clip": 0.01, "clip_per_dim": True, "step_weight": "noise", "pace": 0.1},
}


def held(settings, names) -> dict:
    return {name: getattr(settings, name) for name in names}


@pytest.mark.parametrize("agent", OWN)
def test_a_pipeline_has_them_and_what_is_told_holds(agent, tiny_pipelines, tmp_path):
    model = ["--model", str(tiny_pipelines["sd"])]
    assert held(settings_of("finetune", [*model, "--agent", agent]).agent, OWN[agent]) == OWN[agent]
    told = settings_of("finetune", [*model, "--agent", agent, "--agent.kl_loss", "0.3", "--agent.pace", "null"]).agent
    assert (told.kl_loss, told.pace, told.step_weight) == (0.3, None, "noise")
    assert settings_of("finetune", ["--agent", agent]).agent == {"ddpo": ddpo, "grpo": grpo, "ppo": ppo}[agent].Config()


@pytest.mark.parametrize(
    ("words", "without"),
    [
        (["--agent.form", "sf"], "pace"),
        (["--agent.ratio", "trajectory"], ""),
        (["--agent.updates_per_epoch", "1"], "pace"),
        (["--agent.updates_per_epoch", "1", "--agent.epochs", "2"], ""),
        (["--agent.updates_per_epoch", "2"], ""),
    ],
)
def test_forms_that_do_not_go_with_them_have_their_own(words, without, tiny_pipelines):
    agent = settings_of("finetune", ["--model", str(tiny_pipelines["sd"]), *words]).agent
    assert agent.kl_loss == 0.0
    assert (agent.pace is None) == (without == "pace")


@pytest.mark.parametrize("agent", ["draft", "refl"])
def test_rewards_gradients_have_few_walks_of_a_prompt_and_adapters_a_rate(agent, tiny_pipelines):
    """A comparison, which gives all agents the same rollouts, takes the rate alone."""
    model, lora = ["--model", str(tiny_pipelines["sd"])], ["--lora", "LoRA(rank=4)"]
    plain, adapted = (settings_of("finetune", [*model, "--agent", agent, *more]) for more in ([], lora))
    assert (plain.agent.lr, plain.rollout.samples_per_prompt) == (1e-4, 4)
    assert (adapted.agent.lr, adapted.rollout.samples_per_prompt) == (1e-3, 4)
    told = ["--agent.lr", "2e-4", "--rollout.samples_per_prompt", "7"]
    held = settings_of("finetune", [*model, *lora, "--agent", agent, *told])
    assert (held.agent.lr, held.rollout.samples_per_prompt) == (2e-4, 7)
    assert settings_of("finetune", ["--agent", agent]).rollout.samples_per_prompt == 24, "of a model of one's own"
    made = settings_of("compare", [*model, *lora, "--agents", f"{agent},ddpo"])
    assert made.rollout.samples_per_prompt == 24
    assert next(settings.agent.lr for name, *_, settings in made.runs() if name == agent) == 1e-3


def test_a_comparison_writes_them_down(tiny_pipelines):
    texts = "ddpo,draft,short = grpo(kl_loss=0.04),grpo(window=2),grpo(window = 3)"
    made = settings_of("compare", ["--model", str(tiny_pipelines["sd"]), "--agents", texts])
    names = list(dict.fromkeys(name for name, *_ in made.runs()))
    assert names == ["ddpo", "draft", "short", "grpo(window=2)", "grpo(window=3)"]
    agents = [settings.agent for *_, settings in made.runs()]
    assert held(agents[0], OWN["ddpo"]) == OWN["ddpo"]
    assert held(agents[2], OWN["grpo"]) == OWN["grpo"] | {"kl_loss": 0.04}
    assert held(agents[3], OWN["grpo"]) == OWN["grpo"]
    assert agents[3].window == 2
    assert list(map(for_pipelines, made.agents)) == made.agents  # as config.yaml has them, they are read again
    assert settings_of("compare", ["--agents", "ddpo"]).agents == ["ddpo"]


def test_the_line_at_the_start_names_them():
    assert unusual(ddpo.Config()) == ""
    assert unusual(grpo.Config(lr=0.5, pace=0.1)) == "agent grpo with other than its usual settings: lr 0.5, pace 0.1"


def begun(folder, root, **changes):
    (root / "prompts.txt").write_text("a red cat\ntwo dogs, 3")
    small = {"rollout": {"prompts": 2, "samples_per_prompt": 6}, "root": str(root), "device": "cpu"}
    pipeline = {"prompts": str(root / "prompts.txt"), "size": 16, **changes.pop("pipeline", {})}
    return rlf.finetune(folder, "tiny_pipelines:warm", pipeline=pipeline, **small | changes)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_the_first_update_of_a_fresh_optimiser_stays_in_bounds(family, tiny_pipelines, tmp_path):
    """With ten times the learning rate of the defaults, too; without a pace it does not."""
    largest = {}
    for pace in (0.1, None):
        agent = {"name": "ddpo", "pace": pace, "lr": 0.01}
        run = begun(tiny_pipelines[family], tmp_path, chain={"steps": 3}, agent=agent, guard={"action": "warn"})
        metrics = next(run)
        largest[pace] = metrics["log_ratio_max"]
        if pace:
            assert metrics["skipped"] == 0
            assert metrics["shift"] < 4 * pace
    assert largest[0.1] < 256  # a nat a dimension
    assert largest[None] > 3 * largest[0.1]
