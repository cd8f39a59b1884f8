"""The monitor: what it sees of known pictures, and runs that trip its alarms, stop early and keep the best model."""

import json

import pytest
import torch
from chains import affine, mlp
from processes import rlfusion
from tiny_runs import TINY
from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.sampling import chain_noise, walk
from rlfusion.diffusion.schedule import Cosine
from rlfusion.diffusion.space import Pixels
from rlfusion.jobs.measure import at_once, draw, draw_beside
from rlfusion.rewards import RewardError
from rlfusion.rl.monitor import Best, Config, Monitor


class Corners(nn.Module):
    """A judge whose features are four pixels and whose class is the brightest of them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()

    def features(self, x):
        return x.flatten(1)[:, :4]


LABEL = torch.arange(80) % 4


def pictures(seed: int = 0, spread: float = 0.1) -> torch.Tensor:
    """(80, 1, 4, 4): the corner of the label is bright."""
    x = 0.3 + spread * torch.rand(80, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    x.flatten(1)[torch.arange(80), LABEL] += 0.4
    return x


def monitor(**settings) -> Monitor:
    rewards = {"reward": lambda x, c: x.flatten(1).mean(1), "mine": lambda x, c: -x.flatten(1).mean(1)}
    return Monitor(Config(**settings), Corners(), rewards, pictures(), LABEL)


def test_the_base_itself_is_at_the_origin():
    metrics = monitor().probe(pictures())
    assert metrics["reward"] == -metrics["mine"] == pytest.approx(pictures().mean().item(), rel=1e-5)
    assert metrics["agreement"] == 1
    assert metrics["diversity"] == pytest.approx(1)
    assert metrics["frechet_base"] == pytest.approx(0, abs=1e-6)
    assert {metrics[name] for name in ("brightness", "edge_density", "entropy")} == {0}
    assert monitor().alarms(metrics) == []


def test_brightness_is_in_deviations_of_the_bases_images():
    base = pictures()
    std = base.flatten(1).mean(1).std(correction=0).item()
    assert monitor().probe(base + 2.5 * std)["brightness"] == pytest.approx(2.5, rel=1e-3)


def test_another_sample_of_the_same_law_raises_no_alarm():
    assert monitor().alarms(monitor().probe(pictures(seed=5))) == []


def checked(x: torch.Tensor) -> torch.Tensor:
    """A chequered pattern added: as bright as before, full of edges."""
    sign = (-1.0) ** (torch.arange(4)[:, None] + torch.arange(4))
    return (x + 0.2 * sign).clamp(0, 1)


ALARMS = {
    "diversity": lambda x: pictures()[:4].repeat(20, 1, 1, 1),
    "agreement": lambda x: x.roll(1, 0),
    "brightness": lambda x: (x + 0.25).clamp(max=1),
    "edge_density": checked,
    "entropy": lambda x: (x > 0.5).to(x),
    "Frechet": lambda x: 0.2 * x,
}
QUIET = {"diversity": 0.0, "agreement": 9.0, "image": 1e9, "frechet_base": None, "held_out_fall": 1e9}
SETS = {"brightness": "image", "edge_density": "image", "entropy": "image", "Frechet": "frechet_base"}


@pytest.mark.parametrize("alarm", ALARMS)
def test_each_alarm_is_raised_and_by_its_own_setting(alarm):
    watching = monitor(frechet_base=0.05)
    metrics = watching.probe(ALARMS[alarm](pictures()))
    assert any(alarm in sentence for sentence in watching.alarms(metrics)), metrics
    off = SETS.get(alarm, alarm)
    alone = monitor(**QUIET | {off: getattr(Config(frechet_base=0.05), off)}).alarms(metrics)
    assert any(alarm in sentence for sentence in alone)
    assert monitor(**QUIET).alarms(metrics) == []


def test_a_held_out_reward_that_falls_while_the_reward_rises_is_an_alarm():
    """ "mine" is minus the brightness, and falls by what "reward" rises."""
    base = pictures()
    std = base.flatten(1).mean(1).std(correction=0).item()
    watching = monitor()
    fell = [s for s in watching.alarms(watching.probe(base + 1.5 * std)) if "held-out" in s]
    assert fell == ["held-out reward 'mine' fell by 1.5 standard deviations of the base's while the reward rose"]
    assert watching.alarms(watching.probe(base + 0.9 * std)) == []
    rose = watching.probe(base - 1.5 * std)
    assert not any("held-out" in s for s in watching.alarms(rose))


def test_rewards_that_fail_for_some_samples_count_for_the_others():
    def flaky(x, c):
        value = x.flatten(1).mean(1)
        return value.where(value < value.max(), torch.nan)

    rewards, base = {"reward": flaky, "mine": flaky}, pictures()
    watching = Monitor(Config(), Corners(), rewards, base, LABEL, max_failed=0.1)
    kept = base.flatten(1).mean(1).sort().values[:-1].mean().item()
    assert watching.probe(base)["reward"] == pytest.approx(kept, rel=1e-6)
    assert watching.alarms(watching.probe(base)) == []
    with pytest.raises(RewardError, match="item"):
        Monitor(Config(), Corners(), rewards, base, LABEL)


def test_the_kl_is_told_and_limited():
    watching = monitor(kl=5.0)
    assert "kl" not in watching.probe(pictures())
    assert watching.alarms(watching.probe(pictures(), 4.9)) == []
    assert watching.alarms(watching.probe(pictures(), 5.1)) == ["the KL to the base is 5.1 nats a walk"]


def test_the_kl_of_walks_is_that_of_their_linear_gaussian_steps():
    """sum_t |m - m_ref|^2 / (2 S_t^2) at the states of the walks, by hand."""
    policy, base = (affine(theta, Cosine(), DDIM(1.0), "v") for theta in ((-0.3, 0.25), (-0.1, 0.4)))
    times = TimeGrid(4).times(Cosine())
    label = torch.zeros(7, dtype=torch.int64)
    samples, got = draw_beside(policy, base, times, label, (1, 1, 2), 3, "here")
    assert torch.equal(samples, draw(policy, times, label, (1, 1, 2), 3, "here"))
    expected = torch.zeros(7, dtype=torch.float64)
    noise = chain_noise((3, "here"), range(7), 4, (1, 1, 2))
    with torch.no_grad():
        for step, std in zip(walk(policy, noise, times), policy.stds(times)):
            gap = (step.transition.mean - base(step.obs).mean).flatten(1).square().sum(1)
            expected += gap / (2 * std**2) if std > 0 else 0.0
    assert got.min() > 0
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_samples_are_walked_many_at_a_time_and_decoded_as_few_as_the_space_says():
    class Narrow(Pixels):
        chunk = 2

        def decode(self, z):
            decoded.append(len(z))
            return super().decode(z)

    policy, times, label = mlp(), TimeGrid(3).times(Cosine()), torch.arange(70) % 4
    expected = draw(policy, times, label, (1, 3, 2), 3, "here")
    policy.denoiser.space, decoded, walked = Narrow(), [], []
    policy.denoiser.net.register_forward_pre_hook(lambda _, inputs: walked.append(len(inputs[0])))
    torch.testing.assert_close(draw(policy, times, label, (1, 3, 2), 3, "here"), expected)
    assert walked == [64] * 3 + [6] * 3
    assert decoded == [2] * 35


def test_how_many_are_walked_at_a_time_follows_from_the_size_of_latents_alone():
    assert [at_once(8, (4, side, side)) for side in (8, 32, 64, 128, 1024)] == [64, 64, 16, 8, 8]
    assert at_once(500, (1, 8, 8)) == 500


def test_the_best_is_the_highest_without_an_alarm_and_of_distances_the_least():
    best = Best("reward")
    took = [best.take(n, {"reward": r}, a) for n, r, a in [(1, 0.2, False), (2, 0.1, False), (3, 0.9, True)]]
    assert took == [True, False, False]
    assert (best.step, best.since) == (1, 2)
    near = Best("frechet_base")
    assert near.take(1, {"frechet_base": 3.0}, False)
    assert near.take(2, {"frechet_base": 2.0}, False)
    assert not near.take(3, {"frechet_base": 2.5}, False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"best": "rewrd"}, "best = rewrd: expected one of agreement"),
        ({"samples": 10}, "samples = 10"),
        ({"every": -1}, "every = -1"),
        ({"image": 0}, "image = 0"),
        ({"kl": -1.0}, "kl = -1.0"),
        ({"held_out_fall": 0}, "held_out_fall = 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        Config(**settings)


@pytest.fixture
def root(tiny_root, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cache").symlink_to(tiny_root / "cache")
    return tmp_path


def looks(folder) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "monitor/reward" in line]


def test_a_run_looks_by_default_and_keeps_its_best_model(root):
    said = rlfusion(root, "finetune", *TINY, "--name", "it", "--monitor.held_out", "[ink]", "--monitor.agreement", 9)
    assert said.code == 0, said.err
    folder = root / "runs" / "it"
    metrics = looks(folder)
    assert [line["step"] for line in metrics] == [4, 6]
    assert all("monitor/ink" in line and line["monitor/kl"] > 0 for line in metrics)
    summary = json.loads((folder / "summary.json").read_text())
    best = max(metrics, key=lambda line: line["monitor/reward"])
    assert summary["best"] == {"updates": best["step"], "reward": best["monitor/reward"]}
    again = rlfusion(root, "evaluate", "--checkpoint", "runs/it/best", "--evaluation.samples", 60)
    assert again.code == 0, again.err


def test_an_alarm_stops_a_run_that_is_told_so(root):
    more = ("--monitor.every", 2, "--monitor.stop", "true", "--monitor.frechet_base", 1e-9)
    said = rlfusion(root, "finetune", *TINY, "--name", "it", *more)
    assert said.code == 0, said.err
    folder = root / "runs" / "it"
    assert "stopped after 2 updates: alarm: the Frechet distance" in " ".join(said.err.split())
    assert json.loads((folder / "summary.json").read_text())["updates"] == 2
    assert "After 2 updates" in (folder / "diagnosis.md").read_text()
    again = rlfusion(root, "finetune", "--resume", "runs/it")
    assert again.code == 0
    assert "is finished" in again.err


def test_a_run_without_a_better_look_stops(root):
    more = ("--monitor.every", 1, "--monitor.patience", 2, "--monitor.frechet_base", 1e-9, "--updates", 9)
    said = rlfusion(root, "finetune", *TINY, "--name", "it", *more)
    assert said.code == 0, said.err
    assert "no better reward in 2 looks" in " ".join(said.err.split())
    assert not (root / "runs" / "it" / "best").exists()


def test_an_unknown_held_out_reward_is_refused_before_work(root):
    said = rlfusion(root, "finetune", *TINY, "--name", "it", "--monitor.held_out", "[inkk]")
    assert said.code == 2
    assert "'inkk'" in said.err
    assert not (root / "runs" / "it").exists()
