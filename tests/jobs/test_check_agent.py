"""check-agent: every algorithm that is built in passes, and each way to be wrong is seen."""

from pathlib import Path

import pytest
import torch

from rlfusion.agents import AGENTS
from rlfusion.common.errors import ConfigError
from rlfusion.config import CheckAgent
from rlfusion.jobs.check_agent import check_agent
from rlfusion.rl.check import BEGIN, GOAL, Chain

OWN = "examples/own_agent.py:LeaveOneOut"
WRONG = {
    "gradient": ("return -advantage[terms.walk]", "return advantage[terms.walk]"),
    "gain": ("return -advantage[terms.walk]", "return advantage[terms.walk]"),
    "repeats": ("norm = self.optimization.step()", "norm = self.optimization.step(); _shake(self.policy)"),
    "resume": ('self.optimization.load_state_dict(state["optimization"])', "pass"),
    "dropped": ("/ (count - 1).clamp(min=1)", "/ (len(reward) - 48)"),
    "metrics": ("self.iteration += 1", "self.iteration += 2"),
}
SHAKE = """

def _shake(policy):
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1e-4 * torch.rand(p.shape))
"""


def verdicts(agent: str, **settings: int) -> dict[str, str]:
    found = {row.check: row for row in check_agent(CheckAgent(agent, **settings))}
    return {check: row.verdict for check, row in found.items()} | {f"{c} says": r.message for c, r in found.items()}


def test_the_closed_form_is_what_many_walks_give():
    chain = Chain.make()
    with torch.no_grad():
        chain.task.policy.denoiser.net.theta.copy_(torch.tensor([0.3, -0.2]))
    reward = chain.walks(chain.task.policy, 4000, 0, 0).reward.double()
    error = reward.std().item() / len(reward) ** 0.5
    assert abs(reward.mean().item() - chain.value(chain.theta).item()) < 3 * error < 0.02


def test_the_gradient_is_that_of_finite_differences():
    chain, theta, h = Chain.make(), torch.tensor(BEGIN, dtype=torch.float64) + 0.1, 1e-6
    by_hand = [(chain.value(theta + h * e) - chain.value(theta - h * e)) / (2 * h) for e in torch.eye(2).double()]
    torch.testing.assert_close(chain.gradient(theta), torch.stack(by_hand), rtol=1e-6, atol=1e-8)
    assert GOAL != 0


CHEAPER = {"qsm": "qsm(critic_updates=30, critic_batch=128)"}


@pytest.mark.parametrize("agent", [*AGENTS, OWN])
def test_every_agent_passes(agent):
    found = verdicts(CHEAPER.get(agent, agent), repeats=4)
    assert list(found)[:6] == ["gradient", "gain", "repeats", "resume", "dropped", "metrics"]
    assert "FAILS" not in found.values(), found


@pytest.mark.parametrize("check", WRONG)
def test_what_is_wrong_is_seen(check, tmp_path):
    right = Path("examples/own_agent.py").read_text()
    assert WRONG[check][0] in right
    path = tmp_path / "wrong.py"
    path.write_text(right.replace(*WRONG[check]) + SHAKE)
    found = verdicts(f"{path}:LeaveOneOut", repeats=4)
    assert found[check] == "FAILS", found


def own_agent(path: Path, old: str, new: str) -> str:
    """The example with a change, written to a file; the name of its agent."""
    right = Path("examples/own_agent.py").read_text()
    assert old in right
    path.write_text(right.replace(old, new))
    return f"{path}:LeaveOneOut"


LACKING = {
    "preflight": ("def preflight", "def before"),
    "state_dict": ("def state_dict", "def state"),
    "policy": ("self.policy, self.seed = task.policy, seed", "self.seed = seed"),
    "seed": ("self.policy, self.seed = task.policy, seed", "self.policy = task.policy"),
    "optimization": ("self.optimization", "self.optimizer"),
    "queries": ("self.queries", "self.asked"),
    "update": ("def update", "def learn"),
}


@pytest.mark.parametrize("member", LACKING)
def test_a_learner_without_a_member_is_refused_by_its_name(member, tmp_path):
    agent = own_agent(tmp_path / "lacking.py", *LACKING[member])
    with pytest.raises(
        ConfigError, match=rf"the learner of agent .*, Learner, has no {member}: expected .*AgentLearner"
    ):
        list(check_agent(CheckAgent(agent, repeats=4)))


RETURN = 'return {"reward": batch.reward.mean().item(), "grad_norm": norm}'
ANSWERS = {
    "tensor": (RETURN, RETURN.replace(".item()", ""), "reward is a Tensor, expected a float"),
    "no norm": (RETURN, RETURN.replace("grad_norm", "norm"), "grad_norm is missing"),
    "not finite": (RETURN, RETURN.replace("norm}", "norm, 'extra': float('inf')}"), "extra is not finite"),
}


@pytest.mark.parametrize("wrong", ANSWERS)
def test_metrics_that_are_none_are_named(wrong, tmp_path):
    old, new, said = ANSWERS[wrong]
    found = verdicts(own_agent(tmp_path / "answers.py", old, new), repeats=4)
    assert found["metrics"] == "FAILS"
    assert said in found["metrics says"]


def test_an_update_or_a_preflight_that_returns_nothing_is_refused(tmp_path):
    nothing = own_agent(tmp_path / "nothing.py", RETURN, "pass")
    with pytest.raises(ConfigError, match=r"update of agent .*: it returns None, expected numbers by name"):
        list(check_agent(CheckAgent(nothing, repeats=4)))
    mute = own_agent(
        tmp_path / "mute.py", "return self.transitions.require_on_policy", "self.transitions.require_on_policy"
    )
    with pytest.raises(ConfigError, match="the learner's preflight: it returns None"):
        list(check_agent(CheckAgent(mute, repeats=4)))


def test_a_learner_that_never_steps_fails(tmp_path):
    found = verdicts(own_agent(tmp_path / "still.py", "norm = self.optimization.step()", "norm = 0.0"), repeats=4)
    assert (found["gain"], "does it step?" in found["gain says"]) == ("FAILS", True)
