"""Every family of pretrained pipelines under every learner, all weights and adapters: the table in docs/models.md.

Tiny random pipelines of the tests, reward red above blue. For each family one ``rlfusion compare`` of all learners on
all weights and one on adapters; the gain is that of the evaluation on fixed seeds, in standard deviations of the base
model's rewards. Every run exports its model, which diffusers reads back before it counts; and then the export is
loaded anew, by us and by diffusers, and both sample from the same noise: a cell in which their latents differ by more
than 1e-4 of the largest says so beside its gain.

sft and the stored dpo learn from pairs of a red and a blue image for each prompt, opd from the model that draft has
made in the same row. What was found is kept in ``results/families.json``, and the table is drawn of that:

    python benchmarks/pipelines.py [--families sd,flux] [--agents ddpo,draft] [--weights all,lora] [--seeds 3] [--write]
    python benchmarks/pipelines.py --draw
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from tiny_pipelines import MAKERS, NEWER, SIDE, UNADAPTED  # noqa: E402

from rlfusion import models  # noqa: E402
from rlfusion.common.errors import ConfigError, NumericalError  # noqa: E402
from rlfusion.common.progress import Progress  # noqa: E402
from rlfusion.common.stops import Signals  # noqa: E402
from rlfusion.config import (  # noqa: E402
    Compare,
    Evaluations,
    Rollout,
)
from rlfusion.diffusion.chain import Chain  # noqa: E402
from rlfusion.diffusion.sampling import chain_noise, sample  # noqa: E402
from rlfusion.jobs.compare import compare  # noqa: E402
from rlfusion.jobs.compare.job import slug  # noqa: E402
from rlfusion.jobs.curves import curve  # noqa: E402
from rlfusion.models import pipelines  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "families.json"
DOC, BEGIN, END = ROOT / "docs" / "models.md", "<!-- table of benchmarks/pipelines.py -->", "<!-- end of the table -->"
KNOWN = MAKERS | NEWER
WALKED = "epochs=4, updates_per_epoch=1, kl_loss=0.0"
SETTINGS = {
    "ddpo": f"ddpo(lr=@, {WALKED})",
    "grpo": f"grpo(lr=@, {WALKED})",
    "ppo": f"ppo(lr=@, {WALKED})",
    "awm": "awm(lr=@)",
    "nft": "nft(lr=@)",
    "dpo": "dpo(lr=@)",
    "drwr": "drwr(lr=@)",
    "dawr": "dawr(lr=@)",
    "qsm": "qsm(lr=@, q='denoised', noisings=1)",
    "refl": "refl(lr=@@, updates_per_epoch=2)",
    "draft": "draft(lr=@@, updates_per_epoch=2)",
    "opd": "opd(lr=@, teacher='TEACHER')",
    "sft": "sft(lr=@, batch=32, data='PAIRS')",
    "stored dpo": "dpo(lr=@, batch=32, data='PAIRS')",
}
"""The learners; @ stands for the learning rate of ``RATES``, @@ for that of a reward's own gradient."""

TAUGHT, TEACHER = "opd", "draft"
"""The learner that starts when another's model is there, which it learns from."""

RATES = {"all": ("0.002", "0.01"), "lora": ("0.01", "0.02")}
LORA = {"all": "", "lora": "LoRA(rank=8, alpha=64.0, dropout=0.1)"}
REWARD, PROMPTS = "tiny_pipelines:warm", ("a red cat", "two dogs, 3")
STEPS, WALKS, UPDATES = 2, 32, 4
ALIKE = 1e-4
SIDES = {**SIDE, "lumina_2": 16}
"""Pixels of a side, 8 of others, which the call of these families does not take."""
NARROW = ("sd", "sdxl", "pixart", "pixart_alpha", "hunyuan_dit")
"""Families on whose own grid the last steps have too little noise for a policy gradient."""
TOKENS = {"qwen_image": 200, **dict.fromkeys(("lumina_2", "pixart", "z_image", "flux_2_klein", "flux_2_dev"), 64)}
"""Tokens of a prompt where the family's default is far more than these prompts have."""


def settings(folder: Path, family: str, agents: list[str], weights: str, root: Path, seeds: int) -> Compare:
    """The comparison of ``agents`` on a family."""
    published = pipelines.defaults(str(folder), training=True)
    grid = {"spacing": "trailing"} if family in NARROW else {}
    low, high = RATES[weights]
    side = SIDES.get(family, 8)
    read = {"prompts": str(root / "prompts.txt"), "size": side}
    read |= {"max_sequence_length": TOKENS[family]} if family in TOKENS else {}
    stood_for = {"@@": high, "@": low, "PAIRS": str(pairs(root, side)), "TEACHER": ""}
    if TAUGHT in agents:
        stood_for["TEACHER"] = str(root / f"{family}-{weights}" / run_of(TEACHER, 0))
    return Compare(
        agents=[f"{name} = {filled(SETTINGS[name], stood_for)}" for name in agents],
        rewards=[REWARD],
        seeds=seeds,
        budget_queries=UPDATES * WALKS,
        evaluations=1,
        best_of=[],
        guidance=[],
        root=str(root),
        base=str(folder),
        pipeline=pipelines.Settings(**read),
        lora=LORA[weights],
        chain=Chain(**published | {"steps": STEPS, "guidance_scale": 1.5} | grid),
        rollout=Rollout(prompts=2, samples_per_prompt=WALKS // 2, item=WALKS),
        evaluation=Evaluations(every=0, samples=64, deterministic=False),
    )


def filled(text: str, stood_for: dict[str, str]) -> str:
    """``text`` with what its placeholders stand for, in their order."""
    for mark, value in stood_for.items():
        text = text.replace(mark, value)
    return text


def run_of(agent: str, seed: int) -> str:
    """The folder of a run, within that of its comparison."""
    return slug(f"{agent}-{REWARD}-seed{seed}")


def pairs(root: Path, side: int) -> Path:
    """A table of pairs of noisy images of ``side`` pixels, the chosen one red and the other blue, for each prompt."""
    folder = root / f"pairs-{side}"
    if folder.is_dir():
        return folder
    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(WALKS):
        row = {"caption": PROMPTS[i % len(PROMPTS)]}
        for name, tint in (("chosen", (80, 0, -80)), ("rejected", (-80, 0, 80))):
            pixels = rng.normal(128, 30, (side, side, 3)) + tint
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}-{i}.png")
            row[name] = f"{name}-{i}.png"
        rows.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@torch.no_grad()
def difference(run: Path) -> float:
    """How far apart our latents and diffusers' are, of the export of a run by the pipeline's own sampler, as a share of
    the largest.
    """
    card = models.describe(str(run), pipelines.Settings())
    denoiser = models.build(card)
    chain = Chain(**card.chain | {"spacing": "model", "kernel": denoiser.own.sampling.kernel})
    times, label = chain.times(denoiser), torch.arange(4) % card.classes
    noise = chain_noise((0, "export"), range(4), len(times) - 1, denoiser.space.latent(card.shape))
    ours = sample(chain.policy(denoiser, card.names), noise, times, label)
    theirs = pipelines.published(card.pipeline, card.names, label.tolist(), noise, 1 + chain.weight)
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def cells(folder: Path, family: str, agents: list[str], weights: str, root: Path, seeds: int) -> dict[str, Any]:
    """What the learners reach on a family: the gain of each seed and how far the exports differ, or why a run ended."""
    begin, found = time.process_time(), {}
    first, taught = [name for name in agents if name != TAUGHT], [name for name in agents if name == TAUGHT]
    for some, place in ((first, root / f"{family}-{weights}"), (taught, root / f"{family}-{weights}-{TAUGHT}")):
        if some:
            place.mkdir()
            page = compare(settings(folder, family, some, weights, root, seeds), place, Signals(), Progress())
        for agent in some:
            try:
                runs = [place / run_of(agent, seed) for seed in range(seeds)]
                gains = [round(curve(run)[-1].gain, 4) for run in runs]
                found[agent] = {"gain": gains, "difference": float(f"{max(map(difference, runs)):.1g}")}
            except (OSError, ValueError, ConfigError, NumericalError) as error:  # the table says what did not run
                found[agent] = {"ended": f"{type(error).__name__}: {error}".replace(str(root), "")}
                print(page, file=sys.stderr)
            print(f"{family} {weights} {agent} {found[agent]}", flush=True)
    print(f"{family} {weights}: {time.process_time() - begin:.0f} CPU s", flush=True)
    return found


def shown(cell: dict[str, Any] | None) -> str:
    """A cell of the table: the mean gain over the seeds; empty where it was not run."""
    if cell is None:
        return ""
    if "ended" in cell:
        return "-"
    gain = f"{statistics.fmean(cell['gain']):+.2f}"
    return gain if cell["difference"] <= ALIKE else f"{gain}, export differs by {cell['difference']:.1g}"


def draw(kept: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Write the table of the record into docs/models.md."""
    rows = [(family, weights) for family in KNOWN for weights in RATES if weights in kept.get(family, {})]
    agents = [name for name in SETTINGS if any(name in kept[family][weights] for family, weights in rows)]
    lines = [["family", "weights", *agents], ["---"] * (2 + len(agents))]
    lines += [[*row, *(shown(kept[row[0]][row[1]].get(name)) for name in agents)] for row in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, rest = DOC.read_text().split(BEGIN)
    DOC.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def record(family: str, weights: str, made: dict[str, Any]) -> None:
    """Keep the cells of a row beside what there is, and draw the table anew."""
    kept = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    kept.setdefault(family, {}).setdefault(weights, {}).update(made)
    rows = [json.dumps(family) + ": " + json.dumps(kept[family]) for family in KNOWN if family in kept]
    RECORD.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    draw(kept)


def main() -> None:
    """Run the cells, and keep them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(KNOWN))
    parser.add_argument("--agents", default=",".join(SETTINGS))
    parser.add_argument("--weights", default=",".join(RATES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="keep the cells and draw the table, row by row")
    parser.add_argument("--draw", action="store_true", help="run nothing: draw what is kept")
    args = parser.parse_args()
    torch.set_num_threads(1)
    agents = args.agents.split(",")
    if args.draw:
        draw(json.loads(RECORD.read_text()))
        return
    if TAUGHT in agents and TEACHER not in agents:
        raise SystemExit(f"agents = {args.agents}: {TAUGHT} learns from the model of {TEACHER}, expected both")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        for weights, family in product(args.weights.split(","), args.families.split(",")):
            if weights == "lora" and family in UNADAPTED:
                continue
            if not (root / family).exists():
                torch.manual_seed(0)
                KNOWN[family]().save_pretrained(root / family)
            made = cells(root / family, family, agents, weights, root, args.seeds)
            if args.write:
                record(family, weights, made)


if __name__ == "__main__":
    main()
