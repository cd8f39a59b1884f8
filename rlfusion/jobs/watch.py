"""The monitor at work in a run: its samples, its alarms, the best model so far.

The base model's samples are kept in ``monitor/base.safetensors``, and their SHA-256 in the checkpoints: a resumed run
compares with the same ones, which are drawn again where they are lost.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlfusion.common import storage
from rlfusion.common.weights import pack, require_entries, sha256, unpack
from rlfusion.config import Finetune
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.jobs.measure import Judged, Unjudged, divergence, draw
from rlfusion.rewards import Reward
from rlfusion.rl.monitor import Best, Monitor


@dataclass
class Watch:
    """Looks at a policy from time to time, which is the base model when this is made. ``save_best`` writes the model
    that it has now.
    """

    config: Finetune
    folder: Path
    policy: Policy
    times: Tensor
    judged: Judged | Unjudged
    reward: Reward
    save_best: Callable[[], None]

    def __post_init__(self) -> None:
        self.best = Best(self.config.monitor.best)
        self.monitor: Monitor | None = None
        self.drawn = ""
        noisy = bool((self.policy.stds(self.times) > 0).any())
        self.base = frozen_copy(self.policy) if self.config.monitor.every and noisy else None

    def begin(self, stated: str = "") -> None:
        """Read the base model's samples, of the SHA-256 ``stated``; or draw them, while the policy still is the base
        model.
        """
        file = self.folder / "monitor" / "base.safetensors"
        blob = file.read_bytes() if stated and file.is_file() else b""
        if not blob or sha256(blob) != stated:
            blob = pack({"samples": self._draw().cpu()})
            storage.make_folder(file.parent)
            storage.write(file, blob)
        self.drawn = sha256(blob)
        base = unpack(blob)["samples"].to(self._label.device)
        c = self.config
        held_out = {n: self.judged.reward(n, c.options_of(n), Path(c.root), c.call_options) for n in c.monitor.held_out}
        for reward in held_out.values():
            if isinstance(reward, nn.Module):
                reward.to(base.device)
        rewards = {"reward": self.reward, **held_out}
        self.monitor = Monitor(c.monitor, self.judged.judge, rewards, base, self._label, c.may_fail)

    def due(self, done: int) -> bool:
        """Whether ``done`` updates are the time for a look."""
        every = self.config.monitor.every
        return bool(every) and (done % every == 0 or done == self.config.updates)

    def probe(self, done: int) -> tuple[dict[str, float], list[str]]:
        """What is seen of the policy after ``done`` updates, and the alarms; keeps the model if it is the best yet."""
        metrics = self.monitor.probe(self._draw(), self._divergence())
        alarms = self.monitor.alarms(metrics)
        if self.best.take(done, metrics, bool(alarms)):
            self.save_best()
        if alarms:
            self._write(done, alarms)
        return metrics | {"alarms": float(len(alarms))}, alarms

    def stops(self, alarms: list[str]) -> str:
        """Why the training shall stop here, or ""."""
        settings = self.config.monitor
        if settings.stop and alarms:
            return f"alarm: {alarms[0]}"
        if settings.patience and self.best.since >= settings.patience:
            return f"no better {settings.best} in {self.best.since} looks; the best was after {self.best.step} updates"
        return ""

    def state_dict(self) -> dict:
        return {"best": asdict(self.best), "drawn": self.drawn}

    def load_state_dict(self, state: dict) -> None:
        """Take up the best model so far; what was ``drawn`` is for ``begin``. Raises StateError where it is none."""
        require_entries(state, self.state_dict(), "the monitor")
        require_entries(state["best"], asdict(self.best), "the monitor's best")
        self.best = Best(**state["best"])

    @property
    def _label(self) -> Tensor:
        device = next(self.policy.parameters()).device
        return torch.arange(self.config.monitor.samples, device=device) % self.judged.classes

    def _draw(self) -> Tensor:
        return draw(self.policy, self.times, self._label, self.judged.shape, self.config.seed, "monitor")

    def _divergence(self) -> float | None:
        """``kl`` of the walks that ``_draw`` draws."""
        if self.base is None:
            return None
        shape = self.judged.shape
        kl = divergence(self.policy, self.base, self.times, self._label, shape, self.config.seed, "monitor")
        return kl.mean().item()

    def _write(self, done: int, alarms: list[str]) -> None:
        lines = [
            f"## After {done} updates: what the reward does not see",
            "",
            *[f"- {said}" for said in alarms],
            "",
            "",
        ]
        storage.append(self.folder / "diagnosis.md", "\n".join(lines))
