"""The task that all work items of a run share, and the work of one item: walk the chains and score their ends.

(1)  x_0 = sigma(t_0) z_0,     x_{k+1} ~ p_theta(. | x_k, c) = mean + S z_{k+1},     log p of each step,
     with z the noise stream of the sample (``item``, Eq. 2) and the chain held by ``rlfusion.envs``
"""

import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Self

import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.tensors import Cond, map_cond, staged
from rlfusion.diffusion.gaussian import Gaussian
from rlfusion.diffusion.grid import Grid, Listed
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.envs import DenoisingVectorEnv
from rlfusion.envs.denoising import require_finite
from rlfusion.models.lora_dropout import dropped
from rlfusion.rewards import Reward, WeightedSum, caches, score
from rlfusion.rollout.graphed import Graphs
from rlfusion.rollout.item import WorkItem, noises
from rlfusion.rollout.kept import Part, Path
from rlfusion.rollout.outside import Nothing, Outside
from rlfusion.rollout.rollout_spec import RolloutSpec
from rlfusion.rollout.shared import Prompts
from rlfusion.rollout.trajectory import Trajectory
from rlfusion.training.stages import REWARD, stage


@dataclass(frozen=True)
class Task:
    """A policy, its chain and its reward.

    Attributes:
        policy: acts; the backend loads the weights of each item into it, so nothing else may own it.
        grid: the time grid of the chain.
        shape: of one latent.
        conditions: one a prompt, int64 (P,) or float (P, ...); None for an unconditional model.
        decode: latents (B, *shape) to samples (B, C, H, W) in [0, 1].
        reward: (samples, cond) -> (B,).
        reward_name: what errors call it.
        device: where the policy is and works.
        rollout_spec: the part of each walk that is run, and what of it is kept.
        masked: a reward may fail for a sample, which is then NaN; else that is an error.
        outside: opens what else the learner needs; who walks needs nothing.
    """

    policy: Policy
    grid: Grid
    shape: tuple[int, ...]
    conditions: Tensor | None
    decode: Callable[[Tensor], Tensor]
    reward: Reward
    reward_name: str
    device: str = "cpu"
    rollout_spec: RolloutSpec = field(default_factory=RolloutSpec)
    masked: bool = False
    outside: Outside = field(default_factory=Nothing)

    @cached_property
    def times(self) -> Tensor:
        """The K + 1 times of the chain."""
        return self.grid.times(self.policy.schedule)

    @cached_property
    def noisy(self) -> list[bool]:
        """Which of the K steps take noise."""
        return (self.policy.stds(self.times) > 0).tolist()

    @property
    def _stochastic(self) -> Tensor:
        return torch.tensor(self.noisy).nonzero().flatten()

    def times_in(self, item: WorkItem) -> Tensor:
        """The times that the walks of an item are at: those of the chain, or fewer of them where a window leaps."""
        window = self.rollout_spec.window
        if window is None or window.leap == 1:
            return self.times
        return window.times(self.times, self._stochastic, item.iteration)

    def noisy_in(self, item: WorkItem) -> list[bool]:
        """Which of their steps take noise."""
        if self.rollout_spec.window is None:
            return self.noisy
        within = self.rollout_spec.window.of(self._stochastic, item.iteration).tolist()
        return [k in within for k in range(len(self.times_in(item)) - 1)]

    @cached_property
    def ode(self) -> Policy:
        """The policy whose steps take no noise, of the same denoiser."""
        return Policy(self.policy.denoiser, DDIM(0.0))

    @property
    def prompts(self) -> int:
        """P, 1 where there are no conditions."""
        return 1 if self.conditions is None else len(self.conditions)

    def environment(self, count: int, times: Tensor | None = None) -> DenoisingVectorEnv:
        """The MDP of ``count`` chains, torch in and out, at the times of the chain or at these."""
        return DenoisingVectorEnv(
            count,
            reward=self._named_reward,
            schedule=self.policy.schedule,
            grid=self.grid if times is None else Listed(tuple(times.tolist())),
            shape=self.shape,
            conditions=self.conditions,
            decode=self.decode,
            backend="torch",
            device=self.device,
            autoreset_mode=AutoresetMode.DISABLED,
            masked=self.masked,
        )

    @cached_property
    def _environments(self) -> list[DenoisingVectorEnv]:
        """The environment of the last item, if there was one."""
        return []

    def _environment_of(self, item: WorkItem) -> DenoisingVectorEnv:
        """An environment to be reset; it is made again where the number of walks or their times are others."""
        times = self.times_in(item)
        last = self._environments.pop() if self._environments else None
        if last is None or last.num_envs != len(item) or not torch.equal(last.times, times):
            last = self.environment(len(item), None if times is self.times else times)
        self._environments.append(last)
        return last

    def score(self, x: Tensor, cond: Cond) -> Tensor:
        """The checked reward (B,) of latents (B, *shape), with its gradient where it has one."""
        return score(self.reward, self.decode(x), cond, self.reward_name)

    def require_differentiable_reward(self) -> None:
        """Raise ConfigError unless a finite gradient of the reward, not all 0, reaches latents: two ramps of grey."""
        x = torch.linspace(-0.9, 0.9, 2 * math.prod(self.shape)).reshape(2, *self.shape).to(self.device)
        x.requires_grad_()
        cond = None if self.conditions is None else self.conditions[:1].expand(2, *self.conditions.shape[1:])
        with torch.enable_grad():
            reward = self.score(x, map_cond(lambda c: c.to(x.device), cond))
        gradient = torch.autograd.grad(reward.sum(), x, allow_unused=True)[0] if reward.requires_grad else None
        if gradient is None or not bool(gradient.any()):
            kind = "has no gradient" if gradient is None else "is flat: its gradient is 0"
            raise ConfigError(f"reward {self.reward_name!r} {kind}: expected a differentiable reward")
        if not bool(gradient.isfinite().all()):
            raise ConfigError(f"reward {self.reward_name!r} has a gradient that is not finite: expected finite ones")

    @cached_property
    def _terms(self) -> dict[str, Tensor]:
        """The value (B,) of each of several named rewards for the last samples, before its weight."""
        return {}

    @cached_property
    def _named_reward(self) -> Reward:
        """The reward as the environment, which checks it, calls it in errors; it leaves its terms in ``_terms``."""

        def reward(samples: Tensor, cond: Cond) -> Tensor:
            with stage(REWARD):
                if not isinstance(self.reward, WeightedSum):
                    return self.reward(samples, cond)
                self._terms.update(self.reward.terms(samples, cond, self.masked))
                return self.reward.combine(self._terms)

        reward.__name__ = self.reward_name
        return reward


def run_item(task: Task, item: WorkItem) -> Trajectory:
    """Eq. (1) for the samples of ``item`` under the weights that ``task.policy`` has, as a trajectory on its device.

    Raises:
        RewardError, NumericalError: a sample or reward is unusable; a note names the item.
    """
    return walked(task, item)()


@torch.no_grad()
def walked(task: Task, item: WorkItem) -> Callable[[], Trajectory]:
    """The same but for the end of the chains, which the call that is returned brings: samples, rewards, trajectory. It
    is to be made before ``task`` walks another item.
    """
    with _named(item), dropped(task.policy, item.seed, item.iteration):
        end = _walk(task, item)

    @torch.no_grad()
    def ended() -> Trajectory:
        with _named(item):
            return end()

    return ended


@contextmanager
def _named(item: WorkItem) -> Iterator[None]:
    """Within the context errors have a note that names the item."""
    try:
        yield
    except (ValueError, ArithmeticError, RuntimeError, TypeError) as error:
        error.add_note(f"in {item}")
        raise


def _walk(task: Task, item: WorkItem) -> Callable[[], Trajectory]:
    env, rollout_spec = task._environment_of(item), task.rollout_spec
    group, begin = torch.tensor(item.groups), rollout_spec.begin(item)
    noisy, mixed = task.noisy_in(item), rollout_spec.window is not None
    steps = len(noisy) if rollout_spec.end else int(begin.max())
    noise, shared = _noise(task, item, noisy[:steps]), Prompts(item) if rollout_spec.start == "prompt" else None
    z = next(noise)
    z = z if shared is None else staged(shared.noise(task.shape).to(z.dtype), z.device)
    options = {"noise": z} | ({} if task.conditions is None else {"group": group})
    obs, _ = env.reset(options=options)
    kept = Path(obs.x, steps) if rollout_spec.path else Part(obs.x, begin)
    cond, action, trained = obs.cond, None, rollout_spec.trained
    graphs = None if trained is None else Graphs(trained.of(noisy, item))
    for k, z in zip(range(steps), noise):
        obs = obs if action is None else env.move(action)
        policy: Callable[[Observation], Gaussian] = task.ode if mixed and not noisy[k] else task.policy
        if shared is not None and not any(noisy[: k + 1]):
            policy = partial(shared.once, policy)
        distribution = policy(obs) if graphs is None else graphs(policy, obs, k)
        action = distribution.sample(z)
        kept.add(k, distribution, action)

    def end() -> Trajectory:
        before = _remembered(task)
        reward = env.finish(action) if rollout_spec.end and action is not None else None
        if reward is None and steps == len(noisy):
            require_finite(kept.x)
        walks = Trajectory(
            kept.x,
            task.times_in(item),
            kept.log_prob,
            reward,
            group.to(task.device),
            cond,
            item.version,
            None if rollout_spec.path else begin.to(task.device),
            torch.stack(list(task._terms.values()), 1) if rollout_spec.end and task._terms else None,
            _cached(before, _remembered(task), group) if rollout_spec.end else None,
        )
        return walks if graphs is None else graphs.of(walks)

    return end


def _noise(task: Task, item: WorkItem, steps: list[bool]) -> Iterator[Tensor]:
    """z_0 and the noise of each of the first ``steps``, on the task's device: 0 where a step takes none. It is drawn as
    far as the last step that takes some.
    """
    noisy = [True, *steps]
    drawn = noises(item, 1 + max(k for k, takes in enumerate(noisy) if takes), task.shape)
    device = torch.device(task.device)
    none = torch.zeros((), device=device)
    for takes in noisy:
        z = next(drawn, none)
        yield staged(z, device) if takes else none


def moves(task: Task, item: WorkItem) -> int:
    """The steps that the longest walk of an item takes."""
    spec = task.rollout_spec
    return len(task.times_in(item)) - 1 if spec.end else int(spec.begin(item).max())


@torch.no_grad()
def idle(task: Task, steps: int) -> None:
    """Call the policy as often as a walk of so many steps does, for nothing."""
    group = {} if task.conditions is None else {"group": torch.zeros(1, dtype=torch.int64)}
    obs, _ = task.environment(1).reset(options={"noise": torch.zeros(1, *task.shape, device=task.device), **group})
    for _ in range(steps):
        task.policy(obs)


def _remembered(task: Task) -> tuple[int, int]:
    """The samples so far whose rewards caches remembered, and those that they were asked for."""
    held = list(caches(task.reward))
    return sum(c.found for c in held), sum(c.asked for c in held)


def _cached(before: tuple[int, int], after: tuple[int, int], group: Tensor) -> Tensor | None:
    """``Trajectory.cached`` of an item whose samples have these groups."""
    found, asked = after[0] - before[0], after[1] - before[1]
    return torch.full((len(group),), found / asked) if asked else None


@dataclass(frozen=True)
class Recipe:
    """How a process makes its task, from plain data alone: what crosses to a worker instead of our objects.

    Attributes:
        builder: "package.module:function", called as function(config, blobs) -> Task.
        config: JSON-able; the builder sees it as JSON gives it back (lists for tuples).
        blobs: safetensors blobs (``rlfusion.weights.pack``) by name, such as the frozen parts of a model.
    """

    builder: str
    config: dict[str, Any]
    blobs: Mapping[str, bytes] = field(default_factory=dict)

    @classmethod
    def from_text(cls, builder: str, text: str, blobs: Mapping[str, bytes]) -> Self:
        """The recipe whose config has this JSON ``text``."""
        return cls(builder, json.loads(text), blobs)

    def build(self) -> Task:
        """Call the builder.

        Raises:
            ConfigError: no such function, or a config that JSON cannot hold.
        """
        module, _, name = self.builder.partition(":")
        try:
            function = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"builder {self.builder!r}: expected package.module:function ({error})") from error
        return function(json.loads(self.text), self.blobs)

    @property
    def text(self) -> str:
        """The config as JSON."""
        try:
            return json.dumps(self.config, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the config of builder {self.builder!r} is not JSON: {error}") from error
