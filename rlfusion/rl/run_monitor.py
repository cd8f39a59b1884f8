"""The monitor at work in a run: its samples, its alarms, the best model so far.

The base model's samples are kept in ``monitor/base.safetensors``, and their SHA-256 in the checkpoints: a resumed run
compares with the same ones, which are drawn again where they are lost.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from rlfusion.common import storage
from rlfusion.common.weights import pack, require_entries, sha256, unpack
from rlfusion.rl.monitor import Best, Config, Monitor


@dataclass
class RunMonitor:
    """Looks at a policy from time to time, and writes what is found below ``folder``.

    Attributes:
        settings: those of the monitor.
        updates: of the whole run; the last look is after them.
        folder: of the run.
        draw: the policy's samples now, on fixed seeds.
        look: the same, and the KL of their walks to the base model in nats; None where there is none.
        make: the monitor, from the base model's samples.
        save_best: writes the model that the policy has now.
        show: is given the updates done and the samples of each look, the base model's first.
    """

    settings: Config
    updates: int
    folder: Path
    draw: Callable[[], Tensor]
    look: Callable[[], tuple[Tensor, float | None]]
    make: Callable[[Tensor], Monitor]
    save_best: Callable[[], None]
    show: Callable[[int, Tensor], None] = lambda step, samples: None

    def __post_init__(self) -> None:
        self.best = Best(self.settings.best)
        self.monitor: Monitor | None = None
        self.drawn = ""

    def begin(self, stated: str = "") -> None:
        """Read the base model's samples, of the SHA-256 ``stated``; or draw them, while the policy still is the base
        model.
        """
        file = self.folder / "monitor" / "base.safetensors"
        blob = file.read_bytes() if stated and file.is_file() else b""
        if not blob or sha256(blob) != stated:
            samples = self.draw()
            self.show(0, samples)
            blob = pack({"samples": samples.cpu()})
            storage.make_folder(file.parent)
            storage.write(file, blob)
        self.drawn = sha256(blob)
        self.monitor = self.make(unpack(blob)["samples"])

    def due(self, done: int) -> bool:
        """Whether a probe is due after ``done`` updates."""
        every = self.settings.every
        return bool(every) and (done % every == 0 or done == self.updates)

    def probe(self, done: int) -> tuple[dict[str, float], list[str]]:
        """The monitor's metrics after ``done`` updates, and its alarms; saves the model if it is the best so far."""
        assert self.monitor is not None  # begin() comes first
        samples, kl = self.look()
        self.show(done, samples)
        metrics = self.monitor.probe(samples, kl)
        alarms = self.monitor.alarms(metrics)
        if self.best.take(done, metrics, bool(alarms)):
            self.save_best()
        if alarms:
            self._write(done, alarms)
        return metrics | {"alarms": float(len(alarms))}, alarms

    def stops(self, alarms: list[str]) -> str:
        """Why the training shall stop here, or ""."""
        settings = self.settings
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

    def _write(self, done: int, alarms: list[str]) -> None:
        found = [f"- {message}" for message in alarms]
        lines = [f"## After {done} updates: what the reward does not see", "", *found, "", ""]
        storage.append(self.folder / "diagnosis.md", "\n".join(lines))
