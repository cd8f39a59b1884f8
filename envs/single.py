"""One denoising chain as a ``gymnasium.Env``: the batch of ``denoising`` with B = 1, unbatched at the border."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor

from rlfusion.data import to_pixels
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Schedule
from rlfusion.envs.denoising import DIGITS, TEN_STEPS, DenoisingVectorEnv
from rlfusion.rewards import Reward, ink


class DenoisingEnv(gymnasium.Env[Any, Any]):
    """One denoising chain: a ``DenoisingVectorEnv`` of one, with numpy outside. Settings and spaces are its own."""

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012, as gymnasium has it

    def __init__(
        self,
        *,
        reward: Reward = ink,
        schedule: Schedule | None = None,
        grid: TimeGrid = TEN_STEPS,
        shape: tuple[int, ...] = (1, 8, 8),
        conditions: Any = DIGITS,
        decode: Callable[[Tensor], Tensor] = to_pixels,
        action: Literal["latent", "noise"] = "latent",
        policy: Policy | None = None,
        device: torch.device | str = "cpu",
        render_mode: str | None = None,
    ) -> None:
        """One chain; the arguments are those of ``DenoisingVectorEnv``."""
        self.chain = DenoisingVectorEnv(
            reward=reward,
            schedule=schedule,
            grid=grid,
            shape=shape,
            conditions=conditions,
            decode=decode,
            action=action,
            policy=policy,
            device=device,
            autoreset_mode=AutoresetMode.DISABLED,
            render_mode=render_mode,
        )
        self.render_mode = render_mode
        self.observation_space = self.chain.single_observation_space
        self.action_space = self.chain.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin a new chain; ``options`` as in the vector environment, without the batch: noise (*shape), group ()."""
        if seed is None and self._np_random is None:
            seed = self.np_random_seed
        super().reset(seed=seed)
        batched = {name: np.asarray(value)[None] for name, value in (options or {}).items()}
        obs, info = self.chain.reset(seed=seed, options=batched)
        return _first(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One denoising step; the errors are those of the vector environment."""
        obs, reward, terminated, truncated, info = self.chain.step(np.asarray(action)[None])
        end = {"sample": info["sample"][0]} if info else {}
        return _first(obs), float(reward[0]), bool(terminated[0]), bool(truncated[0]), end

    def render(self) -> np.ndarray | None:
        """The decoded x_t, uint8 (H', W', 3), if ``render_mode`` is "rgb_array"."""
        shown = self.chain.render()
        return None if shown is None else shown[0]


def _first(obs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: value[0] for name, value in obs.items()}
