"""The border of the environment: its spaces, its random beginnings, and numpy or torch on the outside.

    (1)  latents lie in +-b with b = 10 max_k max(alpha(t_k), sigma(t_k)): ten times the scale of x_t for data of unit
         scale; injected noise, when that is the action, in +-5
    (2)  the prompt of a chain is floor(P Phi(z_0)) of P, its initial noise z_1..z_D, for one stream z of standard
         normals keyed by (episode, seed of the environment)

Inside, everything is a batch of torch tensors. ``Numpy`` copies at the border, checks every action and records no
gradient; ``Torch`` hands over the very tensors, checks shapes alone (a value would cost a device sync) and leaves
gradients to the caller.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import iterate
from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.common.seeding import normal
from rlfusion.diffusion.policy import Observation
from rlfusion.diffusion.schedule import Schedule

NOISE_BOUND = 5.0
FRAME_SIDE = 128


def latent_bound(schedule: Schedule, times: Tensor) -> float:
    """b of Eq. (1), exact in float32."""
    at = schedule(times)
    return float(np.float32(10 * torch.maximum(at.alpha.abs(), at.sigma).max().item()))


def observation_space(shape: tuple[int, ...], bound: float, table: Tensor | None) -> spaces.Dict:
    """Dict of x, t, s and, unless ``table`` is None, cond: Discrete for labels (P,), a Box for embeddings (P, ...)."""
    time = {name: spaces.Box(0.0, 1.0, (1,), np.float64) for name in ("t", "s")}  # float32 misses a table's times
    held: dict[str, spaces.Space] = {"x": spaces.Box(-bound, bound, shape, np.float32), **time}
    if table is None:
        return spaces.Dict(held)
    if table.ndim == 1:
        return spaces.Dict(held | {"cond": spaces.Discrete(int(table.max()) + 1)})
    most = table.abs().max().item() or 1.0
    return spaces.Dict(held | {"cond": spaces.Box(-most, most, tuple(table.shape[1:]), np.float32)})


def condition_table(conditions: Any) -> Tensor | None:
    """The prompts' conditions as a tensor: int64 labels (P,), float32 embeddings (P, ...), or None.

    Raises:
        ConfigError: another dtype or rank, no prompt, a negative label, a non-finite embedding.
    """
    if conditions is None:
        return None
    table = torch.as_tensor(conditions)
    if table.dtype == torch.int64 and table.ndim == 1 and len(table) and int(table.min()) >= 0:
        return table
    if table.is_floating_point() and table.ndim > 1 and len(table) and bool(table.isfinite().all()):
        return table.float()
    raise ConfigError(
        f"conditions are {table.dtype} {tuple(table.shape)}: expected None, int64 labels >= 0 (P,), "
        "or finite float embeddings (P, ...)"
    )


def draw(seeds: range, episode: int, shape: tuple[int, ...], prompts: int) -> tuple[Tensor, Tensor]:
    """Eq. (2): the noise (B, *shape) and the prompts (B,) int64 of one episode, row i from ``seeds[i]`` alone."""
    z = normal(("env", episode), seeds, (1 + math.prod(shape),))
    group = (prompts * torch.special.ndtr(z[:, 0].double())).long().clamp(max=prompts - 1)
    return z[:, 1:].reshape(-1, *shape), group


def frames(pixels: Tensor) -> np.ndarray:
    """Pixels (B, C, H, W) in [0, 1], C = 1 or 3, as uint8 (B, H', W', 3), enlarged to about 128 pixels a side.

    Raises:
        ValueError: the pixels are no such images.
    """
    if pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"render shows decoded images (B, 1 or 3, H, W): decode gives {tuple(pixels.shape)}")
    image = (pixels.detach() * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
    factor = max(1, FRAME_SIDE // max(image.shape[1:3]))
    return image.repeat(factor, axis=1).repeat(factor, axis=2)


class Interface(Protocol):
    """The form of an environment's actions and observations."""

    differentiable: ClassVar[bool]
    device: torch.device

    def action(self, value: Any, shape: tuple[int, ...], bound: float) -> Tensor:
        """An action that was given, as a tensor of this shape; ValueError if it is none, or is out of bounds."""

    def tensor(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        """What was given as ``name``, as a tensor of this shape; else ValueError."""

    def observation(self, obs: Observation) -> Any:
        """An observation in this form."""

    def array(self, x: Tensor) -> Any:
        """A tensor in this form."""

    def reward(self, x: Tensor) -> Any:
        """Rewards (B,) in this form."""

    def each(self, space: spaces.Dict, obs: Any) -> Any:
        """The observations of a batch, as Gymnasium hands on those that ended."""


@dataclass(frozen=True)
class Torch:
    """Torch in, torch out, without a copy; an observation is an ``Observation``, its t and s float64 () on the CPU."""

    device: torch.device
    differentiable: ClassVar[bool] = True

    def action(self, value: Any, shape: tuple[int, ...], bound: float) -> Tensor:
        return self.tensor("action", value, shape)

    def tensor(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        """``value`` itself, if it is a tensor of this shape on the environment's device; else ValueError."""
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor (backend 'torch')")
        if value.shape != shape or value.device.type != self.device.type:
            raise ValueError(
                f"{name} is {tuple(value.shape)} on {value.device}: expected {tuple(shape)} on {self.device}"
            )
        return value

    def observation(self, obs: Observation) -> Observation:
        return obs

    def array(self, x: Tensor) -> Tensor:
        return x

    def reward(self, x: Tensor) -> Tensor:
        return x

    def each(self, space: spaces.Dict, obs: Observation) -> Observation:
        """The batch as it is."""
        return obs


@dataclass(frozen=True)
class Numpy:
    """Gymnasium's own interface: arrays in, fresh arrays out, an observation is a dict of them."""

    device: torch.device
    differentiable: ClassVar[bool] = False

    def action(self, value: Any, shape: tuple[int, ...], bound: float) -> Tensor:
        """A copy of the action, float32; ValueError if it has another shape, is not finite or is out of bounds."""
        held = self._array("action", value, shape)
        wrong = ~(np.abs(held) <= bound).reshape(len(held), -1).all(1)
        if wrong.any():
            rows = np.flatnonzero(wrong)
            worst = held[rows[0]].flat[np.argmin(np.abs(held[rows[0]]) <= bound)]
            raise ValueError(
                f"action of environments {rows[:10].tolist()} holds {worst:g}: "
                f"expected finite values in [{-bound:g}, {bound:g}] (nothing is clipped here)"
            )
        return torch.from_numpy(held).to(self.device)

    def tensor(self, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
        """A copy; ValueError if ``value`` has another shape or is not finite."""
        held = self._array(name, value, shape)
        if not np.isfinite(held).all():
            raise ValueError(f"{name} holds {held[~np.isfinite(held)][0]:g}: expected finite values")
        return torch.from_numpy(held).to(self.device)

    @staticmethod
    def _array(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
        held = np.array(value)
        if held.shape != shape or held.dtype.kind not in "fiu":
            raise ValueError(f"{name} is {held.dtype} {held.shape}: expected numbers {tuple(shape)}")
        return held.astype(np.float32, copy=False)

    def observation(self, obs: Observation) -> Mapping[str, np.ndarray]:
        times = {name: np.full((len(obs.x), 1), time.item()) for name, time in (("t", obs.t), ("s", obs.s))}
        held = {"x": self.array(obs.x), **times}
        return held if obs.cond is None else held | {"cond": self.array(obs.cond)}

    def array(self, x: Tensor) -> np.ndarray:
        return np.array(x.detach().cpu().numpy())

    def reward(self, x: Tensor) -> np.ndarray:
        return self.array(x).astype(np.float64)

    def each(self, space: spaces.Dict, obs: Any) -> np.ndarray:
        """The observations one by one in an object array, as Gymnasium's ``final_obs`` is."""
        return np.fromiter(iterate(space, obs), dtype=object)


BACKENDS: Mapping[str, type[Torch] | type[Numpy]] = {"numpy": Numpy, "torch": Torch}
