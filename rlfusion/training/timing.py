"""Seconds of training, without evaluation: ``timing.jsonl``, beside the metrics, which say nothing of the machine."""

import json
import time
from pathlib import Path
from typing import Any

from rlfusion.common import storage
from rlfusion.common.jsonl import read_lines


class Stopwatch:
    """Adds up the time between ``go`` and ``lap``, over interruptions too. CPU seconds are of this process alone."""

    def __init__(self, folder: Path, step: int) -> None:
        """``step`` updates are done; what was written for later ones is forgotten."""
        self.file = folder / "timing.jsonl"
        kept = [(line, held) for line, held in read_lines(self.file)[0] if held["step"] <= step and _timed(held)]
        storage.write(self.file, "".join(f"{line}\n" for line, _ in kept))
        last = kept[-1][1] if kept else {"seconds": 0.0, "cpu_seconds": 0.0}
        self.seconds, self.cpu_seconds = last["seconds"], last["cpu_seconds"]
        self.go()

    def go(self) -> None:
        """Training begins or goes on."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, step: int, queries: int) -> None:
        """An update is done, with so many rewards asked for in all."""
        self.seconds += time.perf_counter() - self._wall
        self.cpu_seconds += time.process_time() - self._cpu
        line = {"step": step, "queries": queries, "seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        storage.append(self.file, json.dumps(line) + "\n")
        self.go()


def _timed(held: dict[str, Any]) -> bool:
    """Whether a line says what ``lap`` writes."""
    return all(isinstance(held.get(name), int | float) for name in ("queries", "seconds", "cpu_seconds"))
