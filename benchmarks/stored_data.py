"""``sft`` and ``dpo`` from stored data, at the query budget of the comparison of all learners (``learners.py``).

For each seed the base model of a comparison draws as many samples as the other learners may ask rewards for. They are
scored once, and stored as a table of images with scores; nothing else is asked for. ``sft`` weighs the images by their
scores, ``dpo`` pairs the best quarter of each prompt with its worst. Both go over them as often as ``UPDATES`` says.
Beside them stands the best quarter of each prompt itself, untrained.

    python benchmarks/stored_data.py [--root runs/learners]    # run, keep, and draw the tables of sft.md and dpo.md
    python benchmarks/stored_data.py --draw                    # draw what is kept
"""

import argparse
import csv
import json
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from learners_page import said
from PIL import Image
from torch import Tensor

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Compare, Finetune
from rlfusion.data import load
from rlfusion.jobs import finetune
from rlfusion.jobs.compare.baselines import gain
from rlfusion.jobs.compare.members import with_settings
from rlfusion.jobs.curves import best_within, curve
from rlfusion.jobs.measure import Judged, draw, make_reward
from rlfusion.jobs.pretrain import base_model
from rlfusion.rewards import score
from rlfusion.training.devices import set_numerics

BENCHMARKS = Path(__file__).resolve().parent
OUT = BENCHMARKS / "results" / "stored-data.json"
DOCS = BENCHMARKS.parent / "docs" / "algorithms"
SHOWN = re.compile(r"(<!-- stored, (\w+) -->\n).*?(<!-- end of stored -->)", re.DOTALL)
REWARDS = ("ink", "class_logprob", "jpeg_compressibility")
UPDATES, EVALUATIONS, QUARTER = 40, 5, 0.25
SFT, DPO = "sft(data={data!r}, lr=0.001, beta=3.0, normalize='group')", "dpo(data={data!r}, lr=0.0003, beta=8.0)"
LEARNERS = {
    "ink": {"SFT": SFT, "DPO": DPO},
    "class_logprob": {"SFT": SFT, "DPO": DPO},
    "jpeg_compressibility": {
        "SFT": "sft(data={data!r}, beta=2.0, normalize='group')",
        "DPO": "dpo(data={data!r}, lr=0.0001, beta=2.0)",
    },
}
"""Of each reward the one of a few settings with the largest gain within the limit on seed 10, which is not told."""


class Bench:
    """The comparison of one reward: its base model, its judge, its reward."""

    def __init__(self, reward: str, root: Path) -> None:
        """The base model and the judge are made where the cache below ``root`` has none."""
        cpu = torch.device("cpu")
        told: Compare = settings_of("compare", ["--config", str(BENCHMARKS / "learners" / f"{reward}.yaml")])
        self.name, self.root, self.config = reward, root, replace(told, root=str(root))
        self.base = base_model(told.pretrain, root, cpu, Signals(), Progress())
        self.judged = Judged.of(load(told.pretrain.data, told.pretrain.size), told.pretrain.held_out, root, cpu)
        denoiser, self.card = models.load(self.base)
        self.policy, self.times = told.chain.policy(denoiser, self.card.names), told.chain.times(denoiser)
        self.reward = make_reward(reward, {}, self.judged.train, root)

    def drawn(self, count: int, seed: int, what: str) -> tuple[Tensor, Tensor, Tensor]:
        """Samples of the base, as pictures of 256 shades have them, with their labels and rewards."""
        label = torch.arange(count) % self.card.classes
        x = draw(self.policy, self.times, label, self.card.shape, seed, what).mul(255).round() / 255
        return x, label, score(self.reward, x, label, self.name).detach()

    def said(self, x: Tensor, label: Tensor, value: Tensor) -> dict[str, float]:
        """Of some samples, what an evaluation says."""
        found = self.judged.report(x, label)
        return {"reward": value.mean().item(), "reward_std": value.std(correction=0).item(), **found}

    def settings(self, agent: str, seed: int, name: str, updates: int) -> Finetune:
        """Those of a run."""
        config = replace(self.config, agents=[agent])
        told = config.settings(config.rows()[0], self.name, seed)
        every = max(1, updates // EVALUATIONS)
        about = {"evaluation": replace(told.evaluation, every=every), "checkpoint_every": updates, "updates": updates}
        return with_settings(told, root=str(self.root), name=name, base=str(self.base), **about)


def stored(folder: Path, x: Tensor, label: Tensor, value: Tensor, names: tuple[str, ...]) -> None:
    """A folder of images with a table of their classes and scores."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "label", "score"])
        for number, (one, of, reward) in enumerate(zip(x, label.tolist(), value.tolist())):
            Image.fromarray(one[0].mul(255).round().byte().numpy()).save(folder / f"{number:05d}.png")
            rows.writerow([f"{number:05d}.png", names[of], reward])


def best(value: Tensor, label: Tensor) -> Tensor:
    """The rows of the best quarter of each class."""
    parts = [(label == c).nonzero().flatten() for c in label.unique().tolist()]
    return torch.cat([rows[value[rows].argsort(descending=True)[: int(len(rows) * QUARTER)]] for rows in parts])


def trained(bench: Bench, agent: str, seed: int, name: str, updates: int) -> dict[str, float]:
    """What a run has at its end, and the largest gain within the limit on its way."""
    settings = bench.settings(agent, seed, name, updates)
    folder = bench.root / name
    finetune.check(settings)
    folder.mkdir(parents=True, exist_ok=True)
    finetune.finetune(settings, folder, Signals(), Progress())
    points = curve(folder)
    end, within = points[-1], best_within(points, bench.config.quality * points[0].frechet)
    told = {name: getattr(end, name) for name in ("gain", "agreement", "frechet", "diversity", "cpu_seconds")}
    return told | {"within": within.gain if within else 0.0}


def rows(bench: Bench, seeds: list[int], updates: int, tag: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    """(row, seed, what it has) of all of a reward."""
    for seed in seeds:
        x, label, value = bench.drawn(bench.config.budget_queries, seed, "stored")
        folder = bench.root / "stored" / f"{bench.name}-{seed}"
        stored(folder, x, label, value, bench.card.names)
        base = bench.said(x, label, value)
        for row, chosen in ("all that is stored", slice(None)), ("its best quarter", best(value, label)):
            said = bench.said(x[chosen], label[chosen], value[chosen])
            found = {"gain": gain(said, base), "diversity": said["diversity_relative"]}
            yield row, seed, found | {key: said[key] for key in ("agreement", "frechet")}
        for row, text in LEARNERS[bench.name].items():
            name = f"stored-{tag}{row}-{bench.name}-seed{seed}"
            yield row, seed, trained(bench, text.format(data=str(folder)), seed, name, updates)


COLUMNS: dict[str, tuple[str, int]] = {
    "end: gain, sd": ("gain", 2),
    "Frechet": ("frechet", 0),
    "agreement": ("agreement", 3),
    "diversity / real": ("diversity", 2),
    "gain up to 3 x": ("within", 2),
    "CPU s": ("cpu_seconds", 1),
}


def table(kept: dict[str, Any], learner: str) -> str:
    """What is stored, and what a learner makes of it, reward by reward."""
    lines = [f"| reward | row | {' | '.join(COLUMNS)} |", "|---|---" + "|---" * len(COLUMNS) + "|"]
    for reward, about in kept.items():
        for row, seeds in about["rows"].items():
            if row in ("SFT", "DPO") and row != learner:
                continue
            cells = [
                said([one.get(name) for one in seeds], lambda value, digits=digits: f"{value:.{digits}f}")
                for name, digits in COLUMNS.values()
            ]
            what = f"`{about['agents'][row]}`" if row == learner else row
            lines.append(f"| {reward}, {about['stored']:,} images | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def drawn(text: str, kept: dict[str, Any]) -> str:
    """A page with its table as the record has it."""
    return SHOWN.sub(lambda found: f"{found[1]}\n{table(kept, found[2])}\n\n{found[3]}", text)


def draw_pages(kept: dict[str, Any]) -> None:
    """Write both pages."""
    for name in ("sft", "dpo"):
        page = DOCS / f"{name}.md"
        page.write_text(drawn(page.read_text(), kept))


def main() -> None:
    """Run all, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/learners"))
    parser.add_argument("--rewards", default=",".join(REWARDS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--updates", type=int, default=UPDATES)
    parser.add_argument("--tag", default="", help="of the names of the runs' folders")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--draw", action="store_true", help="run nothing: draw what is kept")
    args = parser.parse_args()
    if args.draw:
        return draw_pages(json.loads(OUT.read_text()))
    set_numerics(1, torch.device("cpu"))
    kept: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else {}
    for reward in args.rewards.split(","):
        bench = Bench(reward, args.root.absolute())
        found: dict[str, list[dict[str, float]]] = {}
        for row, seed, told in rows(bench, [int(seed) for seed in args.seeds.split(",")], args.updates, args.tag):
            print(reward, row, seed, {name: round(value, 3) for name, value in told.items()}, flush=True)
            found.setdefault(row, []).append({name: float(f"{value:.4g}") for name, value in told.items()})
        kept[reward] = {
            "made": {"torch": torch.__version__.partition("+")[0], "python": platform.python_version()},
            "stored": bench.config.budget_queries,
            "updates": args.updates,
            "agents": {row: text.format(data="DATA") for row, text in LEARNERS[reward].items()},
            "rows": found,
        }
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
    if args.out == OUT:
        draw_pages(kept)
    return None


if __name__ == "__main__":
    main()
