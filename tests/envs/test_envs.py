"""The MDP: Gymnasium's own checks, the batch against single environments, SB3's PPO, exactness against ``walk``."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from rounding import ROUNDING

import rlfusion as rlf
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.diffusion import kernel, schedule
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.sampling import walk
from rlfusion.envs import ENV_ID, DenoisingEnv, DenoisingVectorEnv
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.rewards import RewardError

torch.set_num_threads(1)
K = 4
GRID = TimeGrid(K)
EMBEDDINGS = torch.tensor([[0.5, -2.0], [1.0, 0.0], [3.0, 1.0]])


def brightest(samples, cond):
    return samples.amax((1, 2, 3))


def make_policy() -> Policy:
    net = ResidualMLP((1, 8, 8), classes=10, width=16, depth=1)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    return Policy(Denoiser(net, schedule.Cosine(), "v"), kernel.DDPM())


def torch_env(num_envs=3, **settings) -> DenoisingVectorEnv:
    return DenoisingVectorEnv(num_envs, backend="torch", grid=GRID, **settings)


def actions(env, seed=0, count=30):
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


# --- Gymnasium's contract


@pytest.mark.parametrize("settings", [{}, {"conditions": None}, {"conditions": EMBEDDINGS}])
def test_check_env_is_silent(settings):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gymnasium.make(ENV_ID, grid=GRID, **settings).unwrapped)
    assert [str(w.message) for w in caught] == []


def test_check_env_with_noise_actions_warns_only_that_latents_are_unbounded():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_env(gymnasium.make(ENV_ID, grid=GRID, action="noise", policy=make_policy()).unwrapped)
    assert all("infinity. This is probably too" in str(w.message) for w in caught)


def test_make_and_make_vec_use_the_registered_classes_and_settings():
    env, envs = gymnasium.make(ENV_ID, shape=(3, 4, 4)), gymnasium.make_vec(ENV_ID, num_envs=64, grid=GRID)
    assert isinstance(env.unwrapped, DenoisingEnv)
    assert isinstance(envs, DenoisingVectorEnv)
    assert env.action_space.shape == (3, 4, 4)
    assert envs.action_space.shape == (64, 1, 8, 8)
    assert len(envs.times) == K + 1
    assert envs.spec.id == ENV_ID
    with pytest.raises(TypeError, match="stepps"):
        gymnasium.make(ENV_ID, stepps=3)


def test_record_episode_statistics_wraps_it():
    envs = RecordEpisodeStatistics(gymnasium.make_vec(ENV_ID, num_envs=3, grid=GRID))
    envs.reset(seed=0)
    for action in actions(envs, count=K):
        *_, info = envs.step(action)
    assert info["episode"]["l"].tolist() == [K] * 3
    np.testing.assert_allclose(info["episode"]["r"], info["sample"].mean((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("conditions", [range(10), None, EMBEDDINGS])
def test_the_batch_equals_single_environments(mode, conditions):
    """Observations, rewards, ends and infos, bit for bit, through two and a half episodes and a reset without seed."""
    settings = {"grid": GRID, "conditions": conditions if conditions is None else torch.as_tensor(conditions)}
    batch = DenoisingVectorEnv(5, autoreset_mode=mode, **settings)
    singles = SyncVectorEnv([lambda: DenoisingEnv(**settings)] * 5, autoreset_mode=mode)
    assert batch.observation_space == singles.observation_space
    assert batch.action_space == singles.action_space
    assert batch.metadata == singles.metadata
    assert data_equivalence(batch.reset(seed=7), singles.reset(seed=7), exact=True)
    for action in actions(batch, count=2 * K + 3):
        result, expected = batch.step(action), singles.step(action)
        assert data_equivalence(result, expected, exact=True)
        assert result[0] in batch.observation_space
        if mode is AutoresetMode.DISABLED and result[2].all():
            everyone = {"reset_mask": np.ones(5, bool)}
            assert data_equivalence(batch.reset(options=everyone), singles.reset(options={**everyone}), exact=True)
    assert data_equivalence(batch.reset(), singles.reset(), exact=True)


def test_seeds_decide_and_environments_differ():
    one, two = (DenoisingVectorEnv(4) for _ in range(2))
    a, b = one.reset(seed=5)[0], two.reset(seed=6)[0]
    np.testing.assert_array_equal(a["x"][1:], b["x"][:-1])  # environment i of seed n is environment 0 of seed n + i
    assert len({row.tobytes() for row in a["x"]}) == 4
    second = one.reset()[0]
    assert not np.array_equal(second["x"], a["x"])
    np.testing.assert_array_equal(one.reset(seed=5)[0]["x"], a["x"])
    np.testing.assert_array_equal(one.reset()[0]["x"], second["x"])
    assert not np.array_equal(DenoisingVectorEnv(4).reset()[0]["x"], DenoisingVectorEnv(4).reset()[0]["x"])


def test_an_unseeded_single_environment_can_be_repeated_from_its_seed():
    env = DenoisingEnv()
    first = env.reset()[0]
    assert data_equivalence(DenoisingEnv().reset(seed=env.np_random_seed)[0], first, exact=True)


def test_the_beginning_is_normal_times_sigma_and_prompts_are_uniform():
    env = DenoisingVectorEnv(2000, schedule=schedule.DDPM(), grid=TimeGrid(10, "leading"), shape=(1, 4, 4))
    obs = env.reset(seed=0)[0]
    sigma = float(schedule.DDPM()(torch.tensor(0.901, dtype=torch.float64)).sigma)
    assert obs["t"][0, 0] == 0.901
    assert abs(obs["x"].std() / sigma - 1) < 4 / np.sqrt(2 * obs["x"].size)
    counts = np.bincount(obs["cond"], minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-square, 9 degrees of freedom, p = 1e-4
    assert abs(np.corrcoef(obs["x"].mean((1, 2, 3)), obs["cond"])[0, 1]) < 4 / np.sqrt(2000)


# --- the chain


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_times_fall_and_the_reward_comes_once_at_the_end(backend):
    calls = []

    def spy(samples, cond):
        calls.append((samples, cond))
        return brightest(samples, cond)

    env = DenoisingVectorEnv(3, backend=backend, grid=GRID, reward=spy)
    obs = env.reset(seed=0)[0]
    for k in range(K):
        t, s = (obs.t, obs.s) if backend == "torch" else (obs["t"][0, 0], obs["s"][0, 0])
        assert (float(t), float(s)) == (1 - k / K, 1 - (k + 1) / K)
        assert not calls
        x = torch.linspace(-2, 2, 192).reshape(3, 1, 8, 8) + k
        obs, reward, terminated, truncated, info = env.step(x if backend == "torch" else x.numpy())
        assert bool(terminated.all()) == bool(terminated.any()) == (k == K - 1)
        assert not truncated.any()
        assert bool(info) == (k == K - 1)
        assert k == K - 1 or not reward.any()
    ((samples, cond),) = calls
    held = obs.cond if backend == "torch" else torch.from_numpy(obs["cond"])
    assert torch.equal(cond, held)
    expected = ((x + 1) / 2).clamp(0, 1)
    assert torch.equal(torch.as_tensor(info["sample"]), expected)
    assert torch.equal(samples, expected)
    np.testing.assert_array_equal(reward, expected.amax((1, 2, 3)))
    assert info["_sample"].all()
    last = (obs.x, obs.t, obs.s) if backend == "torch" else (obs["x"], obs["t"], obs["s"])
    np.testing.assert_array_equal(last[0], x)
    assert float(last[1].max()) == float(last[2].max()) == 0


def test_noise_actions_are_the_base_sampler_exactly():
    policy, noise = make_policy(), torch.randn(6, K + 1, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    group = torch.tensor([0, 1, 2, 3, 9, 9])
    with torch.no_grad():
        expected = list(walk(policy, noise, GRID.times(policy.schedule), group))
    for backend in ("numpy", "torch"):
        env = DenoisingVectorEnv(6, backend=backend, grid=GRID, action="noise", policy=policy)
        given = noise if backend == "torch" else noise.numpy()
        env.reset(options={"noise": given[:, 0], "group": group if backend == "torch" else group.numpy()})
        for k, step in enumerate(expected):
            obs = env.step(given[:, k + 1])[0]
            np.testing.assert_array_equal(obs.x.detach() if backend == "torch" else obs["x"], step.x)


def test_single_noise_environment_matches_the_batch():
    policy = make_policy()
    env, batch = (
        DenoisingEnv(grid=GRID, action="noise", policy=policy),
        DenoisingVectorEnv(3, grid=GRID, action="noise", policy=policy),
    )
    one, many = env.reset(seed=2)[0], batch.reset(seed=0)[0]
    for action in actions(batch, count=K):
        np.testing.assert_allclose(one["x"], many["x"][2], **ROUNDING)
        one, many = env.step(action[2])[0], batch.step(action)[0]
    np.testing.assert_allclose(one["x"], many["x"][2], **ROUNDING)


def test_options_of_the_single_environment_are_unbatched():
    env, z = DenoisingEnv(), np.full((1, 8, 8), 0.5, np.float32)
    obs = env.reset(options={"noise": z, "group": 7})[0]
    np.testing.assert_array_equal(obs["x"], z)  # sigma(1) = 1
    assert obs["cond"] == 7


# --- numpy is a border, torch is none


def test_numpy_shares_no_memory_with_its_caller():
    env = DenoisingVectorEnv(2, grid=GRID)
    obs = env.reset(seed=0)[0]
    obs["cond"][:] = 99
    action = actions(env)[0]
    held = action.copy()
    seen = env.step(action)[0]
    seen["x"][:] = 0
    action[:] = 0
    env.render_mode = "rgb_array"
    np.testing.assert_array_equal(env.render()[0][::16, ::16, 0], np.round(np.clip((held[0, 0] + 1) / 2, 0, 1) * 255))
    assert (env.step(held)[0]["cond"] < 10).all()


def test_torch_does_not_copy():
    env = torch_env()
    obs, _ = env.reset(seed=0)
    assert isinstance(obs, Observation)
    assert (obs.t.dtype, obs.t.shape, obs.t.device.type) == (torch.float64, (), "cpu")
    action = torch.zeros(3, 1, 8, 8, requires_grad=True)
    after, reward, terminated, *_ = env.step(action)
    assert after.x.data_ptr() == action.data_ptr()
    assert after.cond.data_ptr() == obs.cond.data_ptr()
    assert (reward.shape, terminated.dtype) == ((3,), torch.bool)


def test_torch_and_numpy_begin_alike():
    a, b = torch_env().reset(seed=3)[0], DenoisingVectorEnv(3, grid=GRID).reset(seed=3)[0]
    np.testing.assert_array_equal(a.x, b["x"])
    np.testing.assert_array_equal(a.cond, b["cond"])


def test_gradients_flow_through_torch_from_reward_to_actions_and_policy():
    policy = make_policy()
    env = torch_env(action="noise", policy=policy, reward=lambda samples, cond: samples.square().mean((1, 2, 3)))
    env.reset(seed=0)
    z = [torch.zeros(3, 1, 8, 8, requires_grad=True) for _ in range(K)]
    for action in z:
        _, reward, *_ = env.step(action)
    reward.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in policy.parameters())
    assert z[0].grad.abs().max() > 0
    env.reset(seed=0)
    with torch.no_grad():
        for action in z:
            _, reward, *_ = env.step(action)
    assert not reward.requires_grad


def test_torch_same_step_gives_the_final_batch():
    env = torch_env(autoreset_mode="SameStep")
    first = env.reset(seed=0)[0]
    for k in range(K):
        x = torch.full((3, 1, 8, 8), k / K)
        obs, _, terminated, _, info = env.step(x)
    assert terminated.all()
    assert info["final_obs"].x is x
    assert torch.equal(info["final_info"]["sample"], (x + 1) / 2)
    assert float(obs.t) == 1
    assert not torch.equal(obs.x, first.x)


# --- errors


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.full((2, 1, 8, 8), np.nan), r"environments \[0, 1\] holds nan"),
        (np.stack([np.zeros((1, 8, 8)), np.full((1, 8, 8), 10.5)]), r"\[1\] holds 10.5: expected .*\[-10, 10\]"),
        (np.zeros((2, 8, 8)), r"\(2, 8, 8\): expected numbers \(2, 1, 8, 8\)"),
        (np.full((2, 1, 8, 8), "a"), "expected numbers"),
    ],
)
def test_a_bad_action_is_refused_and_the_state_stands(action, message):
    env = DenoisingVectorEnv(2, grid=TimeGrid(1))
    env.reset(seed=0)
    with pytest.raises(ValueError, match=message):
        env.step(action)
    assert env.step(np.zeros((2, 1, 8, 8)))[2].all()


def test_torch_refuses_other_types_and_shapes():
    env = torch_env()
    env.reset()
    with pytest.raises(ValueError, match="ndarray: expected a tensor"):
        env.step(np.zeros((3, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) on cpu: expected \(3, 1, 8, 8\)"):
        env.step(torch.zeros(3, 8, 8))


def test_order_is_enforced():
    env = DenoisingVectorEnv(2, grid=TimeGrid(1), autoreset_mode="Disabled", render_mode="rgb_array")
    for call in (env.render, lambda: env.step(np.zeros((2, 1, 8, 8)))):
        with pytest.raises(ResetNeeded, match="before reset"):
            call()
    env.reset()
    env.step(np.zeros((2, 1, 8, 8)))
    with pytest.raises(ResetNeeded, match="after the 1 steps"):
        env.step(np.zeros((2, 1, 8, 8)))


def test_a_move_is_a_step_that_does_not_end_the_chain():
    envs = [DenoisingVectorEnv(2, grid=TimeGrid(3), backend="torch", autoreset_mode="Disabled") for _ in range(2)]
    with pytest.raises(ResetNeeded, match="before reset"):
        envs[0].move(torch.zeros(2, 1, 8, 8))
    actions = torch.randn(2, 2, 1, 8, 8)
    for env in envs:
        env.reset(seed=0)
    for action in actions:
        stepped, moved = envs[0].step(action)[0], envs[1].move(action)
        assert all(map(torch.equal, stepped, moved))
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) on cpu: expected \(2, 1, 8, 8\)"):
        envs[1].step(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="after 2 of 3 steps: call step"):
        envs[1].move(actions[0])
    assert all(map(torch.equal, envs[0].step(actions[1])[:2][1:], envs[1].step(actions[1])[:2][1:]))


def test_a_finish_is_the_step_that_ends_the_chain():
    envs = [DenoisingVectorEnv(2, grid=TimeGrid(2), backend="torch", autoreset_mode="Disabled") for _ in range(2)]
    action = torch.randn(2, 1, 8, 8)
    with pytest.raises(ResetNeeded, match="before reset"):
        envs[1].finish(action)
    for env in envs:
        env.reset(seed=0)
    with pytest.raises(ValueError, match="after 0 of 2 steps: call move"):
        envs[1].finish(action)
    for env in envs:
        env.move(action)
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) on cpu: expected \(2, 1, 8, 8\)"):
        envs[1].finish(torch.zeros(3, 8, 8))
    with pytest.raises(NumericalError, match=r"environments \[1\] are not finite"):
        envs[1].finish(torch.stack([action[0], action[1] / 0]))
    envs[1].reset(seed=0)
    envs[1].move(action)
    assert torch.equal(envs[0].step(action)[1], envs[1].finish(action))
    with pytest.raises(ResetNeeded, match="after the end"):
        envs[1].finish(action)


def scalar(samples, cond):
    return samples.mean()


def nothing(samples, cond):
    return None


def hole(samples, cond):
    return torch.tensor([0.0, float("nan")])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (scalar, r"reward 'scalar' answered shape \(\): expected \(2,\)"),
        (nothing, "reward 'nothing' answered NoneType"),
        (hole, r"reward 'hole' is not finite for 1 of 2 samples: item 1 = nan"),
    ],
)
def test_a_bad_reward_is_named(reward, message):
    env = DenoisingVectorEnv(2, grid=TimeGrid(1), reward=reward)
    env.reset()
    with pytest.raises(RewardError, match=message):
        env.step(np.zeros((2, 1, 8, 8)))


def test_a_sample_that_is_not_finite_is_named():
    env = DenoisingVectorEnv(2, grid=TimeGrid(1), backend="torch")
    env.reset()
    x = torch.zeros(2, 1, 8, 8)
    x[1, 0, 3, 3] = torch.inf  # to_pixels alone would show a white pixel
    with pytest.raises(NumericalError, match=r"samples of environments \[1\]"):
        env.step(x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_envs": 0}, "num_envs = 0"),
        ({"shape": (1, 0)}, "expected positive"),
        ({"backend": "tourch"}, "did you mean 'torch'"),
        ({"action": "noize"}, "did you mean 'noise'"),
        ({"action": "noise"}, "expected a policy for 'noise'"),
        ({"policy": make_policy()}, "none for 'latent'"),
        ({"action": "noise", "policy": make_policy(), "schedule": schedule.Rectified()}, "expected the policy's"),
        ({"autoreset_mode": "NexStep"}, "did you mean 'NextStep'"),
        ({"render_mode": "human"}, "rgb_array"),
        ({"conditions": torch.tensor([-1])}, "expected None, int64 labels >= 0"),
        ({"conditions": torch.tensor([[torch.nan]])}, "finite float embeddings"),
        ({"conditions": []}, "conditions are"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        DenoisingVectorEnv(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nose": 1}, "did you mean 'noise'"),
        ({"noise": np.zeros((2, 8, 8))}, r"options\['noise'\] is float64 \(2, 8, 8\)"),
        ({"noise": np.full((2, 1, 8, 8), np.inf)}, "expected finite"),
        ({"group": np.array([0, 10])}, r"int64 \(2,\) in 0..9"),
        ({"reset_mask": np.array([True, False])}, "chains begin together"),
    ],
)
def test_reset_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenoisingVectorEnv(2).reset(options=options)
    with pytest.raises(ValueError, match="no prompts"):
        DenoisingVectorEnv(1, conditions=None).reset(options={"group": np.array([0])})


# --- rendering, bounds, off-the-shelf learners


def test_render_shows_the_decoded_state():
    env = gymnasium.make(ENV_ID, render_mode="rgb_array")
    env.reset(options={"noise": np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 8, 8)})
    frame = env.render()
    assert (frame.shape, frame.dtype) == ((128, 128, 3), np.uint8)
    assert (frame[0, 0].tolist(), frame[-1, -1].tolist()) == ([0] * 3, [255] * 3)
    assert (frame[:16, :16] == frame[0, 0]).all()
    assert DenoisingEnv().render() is None


def test_the_bound_and_the_beginning_follow_the_schedule():
    class Wide:
        resolution = None

        def __call__(self, t):
            one = torch.ones_like(t)
            return schedule.Level(one, 80 * t, 0 * one, 80 * one)

    env = DenoisingEnv(schedule=Wide())
    assert env.action_space.high.max() == 800
    assert env.reset(options={"noise": np.full((1, 8, 8), 0.5)})[0]["x"].max() == 40  # sigma(1) z
    assert DenoisingEnv().action_space.high.max() == 10


@pytest.mark.parametrize("action", ["latent", "noise"])
def test_stable_baselines_ppo_trains_on_it_unmodified(action):
    sb3 = pytest.importorskip("stable_baselines3")
    settings = {"action": "noise", "policy": make_policy()} if action == "noise" else {}
    env = gymnasium.make(ENV_ID, grid=GRID, **settings)
    learner = sb3.PPO("MultiInputPolicy", env, n_steps=64, batch_size=32, n_epochs=2, seed=0)
    before = [p.detach().clone() for p in learner.policy.parameters()]
    learner.learn(256)
    after = list(learner.policy.parameters())
    assert learner.num_timesteps == 256
    assert all(p.isfinite().all() for p in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    rewards = [episode["r"] for episode in learner.ep_info_buffer]
    assert len(rewards) == 256 // K
    assert all(0 < r < 1 for r in rewards)


@pytest.mark.parametrize("count", [1, 3])
def test_what_a_step_returns_is_the_callers_own(count):
    """Wrappers write into rewards and masks; no later step may feel it."""
    env = rlf.make_env(None, "ink", count, backend="torch")
    env.reset(seed=0)
    action = torch.as_tensor(env.action_space.sample())
    _, reward, terminated, truncated, _ = env.step(action)
    reward += 5
    terminated |= True
    truncated |= True
    _, reward, terminated, truncated, _ = env.step(action)
    assert not reward.any()
    assert not (terminated | truncated).any()
