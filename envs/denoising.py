"""The denoising chain as a Markov decision process (Black et al. 2023, section 4.2), on 1 = t_0 > ... > t_K = 0:

    (1)  state (x_t, t, s, c),    x_{t_0} = sigma(t_0) z,  z ~ N(0, I),    prompt c uniform over the conditions
    (2)  action x_s ("latent"): the next latent itself; or z_s ("noise"): x_s = mean + S z_s of the policy's transition,
         so that an agent whose actions are standard normal is the base sampler
    (3)  reward r(decode(x_0), c) when the chain ends, 0 before it

All chains have K steps and begin together, so the batch is one tensor and all environments end at once.
"""

from collections.abc import Callable
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from rlfusion.common.errors import ConfigError, NumericalError, unknown
from rlfusion.common.tensors import all_finite
from rlfusion.data import to_pixels
from rlfusion.diffusion.grid import Grid, TimeGrid
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import Cosine, Schedule, prior_std
from rlfusion.envs.interface import (
    BACKENDS,
    NOISE_BOUND,
    condition_table,
    draw,
    frames,
    latent_bound,
    observation_space,
)
from rlfusion.rewards import Reward, ink, score

TEN_STEPS = TimeGrid(10)
DIGITS = tuple(range(10))


class DenoisingVectorEnv(gymnasium.vector.VectorEnv[Any, Any, Any]):
    """``num_envs`` denoising chains as one batch of tensors.

    Observation: Dict of x (B, *shape) float32, t and s (B, 1) float64 in [0, 1] (0 and 0 at the end of the chain), and
    cond (B,) int64 or (B, ...) float32 unless unconditional. Latents, in x and as actions, lie in +-b (Eq. 1 of
    ``interface``); action "noise" lies in +-5, and its x, which the policy makes, is unbounded. ``info`` holds
    ``sample`` (B, C, H, W) in [0, 1] when the chain ends.
    Environment i of a reset with seed n is the single environment of seed n + i.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        reward: Reward = ink,
        schedule: Schedule | None = None,
        grid: Grid = TEN_STEPS,
        shape: tuple[int, ...] = (1, 8, 8),
        conditions: Any = DIGITS,
        decode: Callable[[Tensor], Tensor] = to_pixels,
        action: Literal["latent", "noise"] = "latent",
        policy: Policy | None = None,
        backend: Literal["numpy", "torch"] = "numpy",
        device: torch.device | str = "cpu",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        masked: bool = False,
    ) -> None:
        """A batch of chains.

        Args:
            num_envs: B.
            reward: called once, on the whole batch, when the chain ends: (samples (B, C, H, W), cond) -> (B,).
            schedule: what a time means; the policy's by default, else ``Cosine()``.
            grid: the steps of the chain.
            shape: of one latent.
            conditions: one a prompt: int labels (P,), float embeddings (P, ...), or None.
            decode: latents to pixels in [0, 1].
            action: Eq. (2).
            policy: the base sampler of action "noise", which needs it; else None.
            backend: "numpy", or "torch": tensors in and out without a copy, gradients left to the caller.
            device: where the tensors live.
            autoreset_mode: what happens after the end of a chain: next step, same step, or nothing.
            render_mode: "rgb_array" or None.
            masked: a reward may be NaN, which says that it failed for that sample; else that is an error.

        Raises:
            ConfigError: a setting that cannot work.
        """
        if num_envs < 1 or not shape or min(shape) < 1:
            raise ConfigError(f"num_envs = {num_envs}, shape = {shape}: expected positive numbers")
        if backend not in BACKENDS:
            raise unknown("backend", backend, BACKENDS)
        if render_mode not in (None, "rgb_array"):
            raise unknown("render mode", str(render_mode), ["rgb_array"])
        self.num_envs, self.render_mode = num_envs, render_mode
        self.metadata = {
            "render_modes": ["rgb_array"],
            "render_fps": 10,
            "autoreset_mode": _autoreset_mode(autoreset_mode),
        }
        self.schedule = _schedule(schedule, action, policy)
        self.times = grid.times(self.schedule)
        self._each = list(self.times)  # one tensor a time: what is made of it is made once
        self._prior_std = prior_std(self.schedule, self.times)
        self._reward, self._decode, self._policy, self._masked = reward, decode, policy, masked
        self._io = BACKENDS[backend](torch.device(device))
        table = condition_table(conditions)
        self._table = None if table is None else table.to(self._io.device)
        x_bound = latent_bound(self.schedule, self.times) if policy is None else np.inf
        bound = x_bound if policy is None else NOISE_BOUND
        self.single_observation_space = observation_space(tuple(shape), x_bound, table)
        self.single_action_space = gymnasium.spaces.Box(-bound, bound, tuple(shape), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._shape, self._bound = tuple(shape), float(bound)
        self._batch = (num_envs, *self._shape)
        self._episode, self._k = -1, 0
        self._x: Tensor | None = None
        self._cond: Tensor | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin new chains. A seed starts the stream of episodes anew; without one it goes on.

        ``options`` may hold ``noise``, the standard normal z of Eq. (1) (B, *shape), and ``group``, the index of each
        environment's prompt (B,) in 0..P-1, instead of drawn ones; and ``reset_mask`` (B,), which must be all true.

        Raises:
            ValueError: an unknown option, or one of another shape or range.
        """
        super().reset(seed=seed)
        if seed is not None:
            self._episode = -1
        self._begin(**_checked_options(options or {}, self.num_envs))
        return self._io.observation(self._observation()), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """One denoising step of all chains; after their end, by the autoreset mode, a reset (NEXT_STEP) or an error.

        Raises:
            ResetNeeded: before ``reset``, or after the end where autoreset is disabled.
            ValueError: an action of another shape or, with numpy, one not finite or out of bounds (the state stands).
            NumericalError: a sample that is not finite; a reward that is not, or is no tensor (B,) (RewardError).
        """
        if self._x is None:
            raise ResetNeeded("step() before reset(): the chain has no state yet")
        mode = self.metadata["autoreset_mode"]
        if self._ended:
            if mode is AutoresetMode.DISABLED:
                raise ResetNeeded(f"step() after the {self._k} steps of the chain: call reset()")
            self._begin()
            return self._result(None, {})
        with torch.set_grad_enabled(self._io.differentiable and torch.is_grad_enabled()):
            self._advance(self._io.action(actions, self._batch, self._bound))
            reward, info = self._end() if self._ended else (None, dict[str, Any]())
        if reward is None or mode is not AutoresetMode.SAME_STEP:
            return self._result(reward, info)
        final = {"final_obs": self._io.observation(self._observation()), "final_info": info}
        final["final_obs"] = self._io.each(self.observation_space, final["final_obs"])
        self._begin()
        return self._result(reward, final | {f"_{name}": self._mask(True) for name in final})

    def move(self, action: Tensor) -> Observation:
        """A step that does not end the chain, torch in and out: what ``step`` says beside the state is known then, no
        reward, terminations or truncations.

        Raises:
            ResetNeeded: before ``reset``.
            ValueError: an action of another shape, or the last step, which ends the chain.
        """
        if self._x is None or self._ended:
            raise ResetNeeded("move() before reset(), or after the end of the chain: call reset()")
        if self._k >= self._last - 1:
            raise ValueError(f"move() after {self._k} of {self._last} steps: call step(), which ends the chain")
        self._advance(self._io.action(action, self._batch, self._bound))
        return self._observation()

    def finish(self, action: Tensor) -> Tensor:
        """The step that ends the chain, torch in and out: its rewards (B,). What else ``step`` says is known then.

        Raises:
            ResetNeeded: before ``reset``, or after the end.
            ValueError: an action of another shape, or a step that does not end the chain.
            NumericalError: as ``step`` does.
        """
        if self._x is None or self._ended:
            raise ResetNeeded("finish() before reset(), or after the end of the chain: call reset()")
        if self._k < self._last - 1:
            raise ValueError(f"finish() after {self._k} of {self._last} steps: call move(), which goes on")
        self._advance(self._io.action(action, self._batch, self._bound))
        return self._scored()[0]

    @torch.no_grad()
    def render(self) -> tuple[np.ndarray, ...] | None:
        """The decoded x_t of each environment, uint8 (H', W', 3), if ``render_mode`` is "rgb_array"."""
        if self.render_mode is None:
            return None
        if self._x is None:
            raise ResetNeeded("render() before reset(): the chain has no state yet")
        return tuple(frames(self._decode(self._x)))

    @property
    def _last(self) -> int:
        """K, the steps of a chain."""
        return len(self._each) - 1

    @property
    def _ended(self) -> bool:
        return self._k == self._last

    @property
    def _latents(self) -> Tensor:
        """x_t (B, *shape)."""
        if self._x is None:
            raise ResetNeeded("the chain has no state yet: call reset()")
        return self._x

    def _observation(self) -> Observation:
        return Observation(self._latents, self._each[self._k], self._each[min(self._k + 1, self._last)], self._cond)

    def _begin(self, noise: Any = None, group: Any = None) -> None:
        """Eq. (1), from the options where given, else from the environments' streams."""
        shape, prompts = self._shape, 1 if self._table is None else len(self._table)
        z = None if noise is None else self._io.tensor("options['noise']", noise, self._batch)
        index = None if group is None else _checked_group(group, self.num_envs, self._table)
        self._episode += 1
        if z is None or (index is None and self._table is not None):
            first = self.np_random_seed
            assert first is not None  # gymnasium draws one where none was given
            drawn = draw(range(first, first + self.num_envs), self._episode, shape, prompts)
            z, index = drawn[0].to(self._io.device) if z is None else z, drawn[1] if index is None else index
        self._x, self._k = z * self._prior_std, 0
        table = self._table
        self._cond = None if table is None or index is None else table.index_select(0, index.to(table.device))

    def _advance(self, action: Tensor) -> None:
        """Eq. (2)."""
        self._x = action if self._policy is None else self._policy(self._observation()).sample(action)
        self._k += 1

    def _scored(self) -> tuple[Tensor, Tensor]:
        """Eq. (3), and the samples."""
        require_finite(self._latents.detach())
        samples = self._decode(self._latents)
        name = getattr(self._reward, "__name__", repr(self._reward))
        return score(self._reward, samples, self._cond, name, self._masked), samples

    def _end(self) -> tuple[Tensor, dict[str, Any]]:
        """Eq. (3), with the info of the end."""
        reward, samples = self._scored()
        return reward, {"sample": self._io.array(samples), "_sample": self._mask(True)}

    def _result(self, reward: Tensor | None, info: dict[str, Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """What ``step`` returns; a reward marks the end of the chain."""
        end = reward is not None
        reward = torch.zeros(self.num_envs, device=self._io.device) if reward is None else reward
        obs = self._io.observation(self._observation())
        return obs, self._io.reward(reward), self._mask(end), self._mask(False), info

    def _mask(self, value: bool) -> Any:
        return self._io.array(torch.full((self.num_envs,), value, device=self._io.device))


def require_finite(x: Tensor) -> None:
    """Refuse ends of chains x (B, *) that are not finite.

    Raises:
        NumericalError: names their environments.
    """
    if not all_finite(x):
        rows = (~x.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        raise NumericalError(f"samples of environments {rows[:10]} are not finite")


def _schedule(schedule: Schedule | None, action: str, policy: Policy | None) -> Schedule:
    if action not in ("latent", "noise"):
        raise unknown("action", action, ["latent", "noise"])
    if (action == "noise") != (policy is not None):
        raise ConfigError(
            f"action = {action!r} with policy = {policy}: expected a policy for 'noise', none for 'latent'"
        )
    if policy is not None and schedule not in (None, policy.schedule):
        raise ConfigError(f"schedule = {schedule}: expected the policy's, {policy.schedule}, or None")
    return policy.schedule if policy is not None else schedule or Cosine()


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    known = {m.value: m for m in AutoresetMode}
    if isinstance(mode, AutoresetMode):
        return mode
    if mode not in known:
        raise unknown("autoreset mode", mode, known)
    return known[mode]


def _checked_options(options: dict[str, Any], count: int) -> dict[str, Any]:
    for name in options:
        if name not in ("noise", "group", "reset_mask"):
            raise unknown("reset option", name, ["noise", "group", "reset_mask"])
    if "reset_mask" not in options:
        return options
    mask = np.asarray(options["reset_mask"])
    if mask.shape != (count,) or not mask.all():
        raise ValueError(f"options['reset_mask'] = {mask}: expected ({count},), all true: chains begin together")
    return {name: value for name, value in options.items() if name != "reset_mask"}


def _checked_group(group: Any, count: int, table: Tensor | None) -> Tensor:
    if table is None:
        raise ValueError("options['group'] without conditions: there are no prompts to choose from")
    index = torch.as_tensor(group)
    plain = index.shape == (count,) and index.dtype == torch.int64
    if not plain or not 0 <= int(index.min()) <= int(index.max()) < len(table):
        raise ValueError(f"options['group'] = {index}: expected int64 ({count},) in 0..{len(table) - 1}")
    return index
