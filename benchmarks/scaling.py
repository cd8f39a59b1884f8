"""The tables of docs/scaling.md: arithmetic from what ``scaling_models.py`` counted, and nothing else.

    python benchmarks/scaling.py                         # prints them
    python benchmarks/scaling.py --write docs/scaling.md # puts them in their places on the page

With n trained and f frozen parameters, N ranks, K steps of a walk, W walks of a rollout, F and B the FLOPs of a forward
and a backward pass of one sample, all of the counted networks:

    (1)  state of a rank     4 n (weights, float32) + 4 n (gradients) + 8 n (AdamW) + 2 f (bfloat16)
    (2)  kept beside it      4 n (average) + 4 n (reference of the KL) + 4 n (2 + 1) + 8 n (to undo an update)
    (3)  sharded             (1) and (2) divided by N
    (4)  wire, a micro-batch of a step    replicated  2 (N - 1) / N 4 n, once a step;   exact  (N - 1) 4 n, once a step;
                             sharded  (N - 1) / N (2 (4 n + 2 f) + 4 n), for every micro-batch
    (5)  seconds             rollout  2 W K F / (N P);   learning  2 W K (2 F + B) / (N P), checkpointed, both guided
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

COUNTED = Path(__file__).parent / "results" / "scaling-models.json"
GPUS = (8, 64, 512)
GPU_BYTES, USABLE = 80e9, 0.9
NODE = 8
PEAK, SHARE_OF_PEAK = 9.89e14, 0.4
INSIDE, BETWEEN = 450e9, 50e9
"""Bytes a second of a GPU to the others of its node (NVLink), and to those of other nodes (400 Gb/s)."""
WALKS, STEPS, UPDATES = 64 * 24, 10, 2


class Kind(NamedTuple):
    """What is trained of a network: ``n`` parameters, beside ``f`` frozen ones."""

    name: str
    n: int
    f: int

    @property
    def state(self) -> float:
        """Eq. (1)."""
        return 16.0 * self.n + 2.0 * self.f

    @property
    def beside(self) -> float:
        """Eq. (2)."""
        return 28.0 * self.n


def kinds(model: dict[str, Any]) -> tuple[Kind, Kind]:
    """What may be trained of a model: adapters, or all weights."""
    return Kind("LoRA", model["adapters"], model["parameters"]), Kind("all weights", model["parameters"], 0)


def wire(kind: Kind, ranks: int, how: str) -> float:
    """Eq. (4): bytes that a rank sends."""
    parts = (ranks - 1) / ranks
    n, f = 4.0 * kind.n, 2.0 * kind.f
    return {"replicated": 2 * parts * n, "exact": (ranks - 1) * n, "sharded": parts * (2 * (n + f) + n)}[how]


def rate(ranks: int) -> float:
    """Bytes a second that the slowest link of a ring over so many ranks has for each."""
    return INSIDE if ranks <= NODE else BETWEEN


def seconds(model: dict[str, Any], ranks: int) -> tuple[float, float]:
    """Eq. (5): of a rollout, and of learning from it."""
    speed = ranks * PEAK * SHARE_OF_PEAK
    forward, backward = model["forward"], model["backward"]
    return 2 * WALKS * STEPS * forward / speed, 2 * WALKS * STEPS * (2 * forward + backward) / speed


def room(kind: Kind, model: dict[str, Any], ranks: int) -> tuple[bool, int]:
    """Whether the state must be sharded over the ranks, and the samples that a rank then learns from at once, with
    activations made again: 0 where not even one fits.
    """
    whole = kind.state + kind.beside
    sharded = whole + model["checkpointed"] > USABLE * GPU_BYTES
    left = USABLE * GPU_BYTES - (whole / ranks if sharded else whole)
    return sharded, max(0, int(left / model["checkpointed"]))


def spent(kind: Kind, model: dict[str, Any], ranks: int) -> dict[str, float]:
    """Seconds of one update, by what they are spent on; nothing where it does not fit."""
    sharded, rows = room(kind, model, ranks)
    if not rows:
        return {}
    rollout, learning = seconds(model, ranks)
    batches = max(UPDATES, math.ceil(2 * WALKS * STEPS / ranks / rows)) if sharded else UPDATES
    sent = batches * wire(kind, ranks, "sharded" if sharded else "replicated") / rate(ranks)
    return {"rollout": rollout, "learning": learning, "wire": sent, "publishing": 4.0 * kind.n / BETWEEN}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def gb(size: float) -> str:
    """Bytes, in GB with three digits."""
    return f"{size / 1e9:.3g}"


def samples(models: dict[str, Any]) -> str:
    """What one sample takes of each model."""
    head = ["model", "pixels", "parameters, 1e9", "LoRA, 1e6", "forward, TFLOP", "backward, TFLOP"]
    head += ["activations, GB", "checkpointed, GB"]
    rows = [
        [name, str(m["pixels"]), f"{m['parameters'] / 1e9:.3f}", f"{m['adapters'] / 1e6:.1f}"]
        + [f"{m[key] / 1e12:.3g}" for key in ("forward", "backward")]
        + [gb(m[key]) for key in ("activations", "checkpointed")]
        for name, m in models.items()
    ]
    return table(head, rows)


def memory(models: dict[str, Any]) -> str:
    """The bytes of a rank, of each model and kind."""
    head = ["model", "trained", "weights, gradients, moments", "beside", "all, on one rank"]
    head += [f"over {n} ranks" for n in GPUS]
    rows = [
        [name, kind.name, gb(kind.state), gb(kind.beside), gb(kind.state + kind.beside)]
        + [gb((kind.state + kind.beside) / n) for n in GPUS]
        for name, m in models.items()
        for kind in kinds(m)
    ]
    return table(head, rows)


def traffic(models: dict[str, Any]) -> str:
    """The bytes on the wire, of each model and kind."""
    ways = [(how, n) for n in GPUS for how in ("replicated", "exact", "sharded")]
    head = ["model", "trained", *(f"{how}, {n}" for how, n in ways), "a version", "a walk, MB"]
    rows = [
        [name, kind.name]
        + [gb(wire(kind, n, how)) for how, n in ways]
        + [gb(4.0 * kind.n), f"{(STEPS + 1) * m['latent'] * 4 / 1e6:.3g}"]
        for name, m in models.items()
        for kind in kinds(m)
    ]
    return table(head, rows)


def verdict(models: dict[str, Any]) -> str:
    """What saturates first, and which settings to choose."""
    head = ["model", "trained", "GPUs", "shard", "samples at once"]
    head += ["rollout, s", "learning, s", "wire, s", "publishing, s", "saturates first", "then"]
    rows = []
    for name, m in models.items():
        for kind in kinds(m):
            for n in GPUS:
                sharded, rows_at_once = room(kind, m, n)
                took = spent(kind, m, n)
                order = sorted(took, key=lambda what: -took[what])[:2] or ["memory: not even one fits", ""]
                figures = [f"{s:.3g}" for s in took.values()] or [""] * 4
                start = [name, kind.name, str(n), "yes" if sharded else "no", str(rows_at_once)]
                rows.append([*start, *figures, *order])
    return table(head, rows)


TABLES = {"samples": samples, "memory": memory, "traffic": traffic, "verdict": verdict}


def tables() -> dict[str, str]:
    """Each table by its name."""
    models = json.loads(COUNTED.read_text())
    return {name: make(models) for name, make in TABLES.items()}


def placed(page: str) -> str:
    """The page with the tables between their marks, <!-- NAME --> and <!-- / -->."""
    for name, text in tables().items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- / -->")
        assert mark, f"no place for {name}"
        assert end, f"no place for {name}"
        page = f"{before}{mark}{text}\n{end}{after}"
    return page


def main() -> None:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="the page to put them on")
    page = parser.parse_args().write
    if page is None:
        print("\n\n".join(tables().values()))
    else:
        page.write_text(placed(page.read_text()))


if __name__ == "__main__":
    main()
