"""Seconds of training, without evaluation: ``timing.jsonl``, beside the metrics, which say nothing of the machine.

A line has the seconds and queries so far; and, of the updates since the line before, the seconds of each stage
(``training.stages``), and what follows from them: ``utilisation``, the share that is not idle; samples a second;
where FLOPs are counted (``training.flops``) FLOP/s while learning, and MFU; and where workers or ranks are at work
the bytes that moved between them (``rollout.backend.Backend.moved``).
"""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.jsonl import read_lines
from rlfusion.training.flops import Flops
from rlfusion.training.stages import IDLE, LEARN

FILE = "timing.jsonl"
NONE: Mapping[str, float] = {}


class Stopwatch:
    """Adds up the time between ``go`` and ``lap``, over interruptions too. CPU seconds are of this process alone."""

    def __init__(self, folder: Path, step: int) -> None:
        """``step`` updates are done; what was written for later ones is forgotten."""
        self.file = folder / FILE
        kept = [(line, held) for line, held in read_lines(self.file)[0] if held["step"] <= step and _timed(held)]
        storage.write(self.file, "".join(f"{line}\n" for line, _ in kept))
        last = kept[-1][1] if kept else {"seconds": 0.0, "cpu_seconds": 0.0}
        self.seconds, self.cpu_seconds = last["seconds"], last["cpu_seconds"]
        self.go()

    def go(self) -> None:
        """Training begins or goes on."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(
        self,
        step: int,
        queries: int,
        stages: Mapping[str, float] = NONE,
        samples: float = math.nan,
        flops: Flops | None = None,
        moved: Mapping[str, float] = NONE,
    ) -> dict[str, float]:
        """Updates are done, with so many rewards asked for in all: the figures since the last lap, by name.

        Args:
            stages: the seconds of each stage since then.
            samples: that were learned from since then.
            flops: counts those of the learner. What it takes to count them is not counted as training.
            moved: the bytes that moved since then, by what they are.
        """
        took = time.perf_counter() - self._wall
        self.seconds += took
        self.cpu_seconds += time.process_time() - self._cpu
        line = {"step": step, "queries": queries, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        figures = derived(took, stages, samples, *((flops.taken(), flops.peak) if flops else (math.nan, math.nan)))
        figures |= {f"bytes/{name}": float(count) for name, count in moved.items()}
        storage.append(self.file, json.dumps({**line, **figures}) + "\n")
        self.go()
        return figures


def derived(took: float, stages: Mapping[str, float], samples: float, flops: float, peak: float) -> dict[str, float]:
    """The figures of ``Stopwatch.lap`` after so many seconds: those that are finite."""
    found = {f"seconds/{name}": seconds for name, seconds in stages.items()}
    if took > 0 and stages:
        found["utilisation"] = 1 - min(1.0, stages.get(IDLE, 0.0) / took)
    if took > 0:
        found["samples_per_second"] = samples / took
    if stages.get(LEARN, 0.0) > 0:
        found["flops_per_second"] = flops / stages[LEARN]
        found["mfu"] = found["flops_per_second"] / peak
    return {name: value for name, value in found.items() if math.isfinite(value)}


def last_of(folder: Path) -> dict[str, float]:
    """The last whole line of ``timing.jsonl`` in ``folder``; nothing where there is none."""
    file = folder / FILE
    lines = read_lines(file)[0] if file.is_file() else []
    held = [record for _, record in lines if _timed(record)]
    return {name: n for name, n in held[-1].items() if isinstance(n, int | float)} if held else {}


def _timed(held: dict[str, Any]) -> bool:
    """Whether a line says what ``lap`` writes."""
    return all(isinstance(held.get(name), int | float) for name in ("queries", "seconds", "cpu_seconds"))
