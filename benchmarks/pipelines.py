"""Every family of pretrained pipelines under every learner, all weights and adapters: the table in docs/models.md.

Tiny random pipelines of the tests, reward red above blue. For each family one ``rlfusion compare`` of all learners on
all weights and one on adapters; the gain is that of the evaluation on fixed seeds, in standard deviations of the base
model's rewards. Every run exports its model, which diffusers reads back before it counts; and then the export is
loaded anew, by us and by diffusers, and both sample from the same noise: a cell in which their latents differ by more
than 1e-4 of the largest says so in the place of its gain.

    python benchmarks/pipelines.py [--families sd,flux] [--agents ddpo,draft] [--weights all,lora] [--write]
"""

import argparse
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch

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
}
"""The learners; @ stands for the learning rate of ``RATES``, @@ for that of a reward's own gradient."""

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


def settings(folder: Path, family: str, agents: list[str], weights: str, root: Path) -> Compare:
    """The comparison of ``agents`` on a family."""
    published = pipelines.defaults(str(folder), training=True)
    grid = {"spacing": "trailing"} if family in NARROW else {}
    low, high = RATES[weights]
    read = {"prompts": str(root / "prompts.txt"), "size": SIDES.get(family, 8)}
    read |= {"max_sequence_length": TOKENS[family]} if family in TOKENS else {}
    return Compare(
        agents=[f"{name} = {SETTINGS[name].replace('@@', high).replace('@', low)}" for name in agents],
        rewards=[REWARD],
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


def cells(folder: Path, family: str, agents: list[str], weights: str, root: Path) -> dict[str, str]:
    """What the learners reach on a family."""
    begin, place = time.process_time(), root / f"{family}-{weights}"
    place.mkdir()
    page = compare(settings(folder, family, agents, weights, root), place, Signals(), Progress())
    found = {}
    for agent in agents:
        run = place / slug(f"{agent}-{REWARD}-seed0")
        try:
            points, gap = curve(run), difference(run)
        except (OSError, ValueError, ConfigError, NumericalError) as error:  # the table says what did not run
            print(f"{family} {weights} {agent}: {type(error).__name__}: {error}\n{page}", file=sys.stderr)
            found[agent] = "-"
            continue
        found[agent] = f"{points[-1].gain:+.2f}" if gap <= ALIKE else f"export differs by {gap:.1g}"
        print(f"{family} {weights} {agent} {found[agent]}; ours and diffusers' latents differ by {gap:.1g}", flush=True)
    print(f"{family} {weights}: {time.process_time() - begin:.0f} CPU s", flush=True)
    return found


def table(text: str) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of a table by (family, weights) and learner."""
    lines = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.strip().splitlines()]
    return {(line[0], line[1]): dict(zip(lines[0][2:], line[2:])) for line in lines[2:]}


def written(held: dict[tuple[str, str], dict[str, str]]) -> str:
    """The table of cells; one that was not run is empty."""
    agents = [agent for agent in SETTINGS if any(agent in row for row in held.values())]
    keys = sorted(held, key=lambda key: (list(KNOWN).index(key[0]), list(RATES).index(key[1])))
    rows = [[*key, *(held[key].get(agent, "") for agent in agents)] for key in keys]
    head = [["family", "weights", *agents], ["---"] * (2 + len(agents))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows])


def write(key: tuple[str, str], made: dict[str, str]) -> None:
    """Put cells into the table in docs/models.md, whose others stay."""
    text = DOC.read_text()
    before, rest = text.split(BEGIN)
    old, after = rest.split(END)
    held = table(old)
    held[key] = held.get(key, {}) | made
    DOC.write_text(f"{before}{BEGIN}\n{written(held)}\n{END}{after}")


def main() -> None:
    """Run the cells, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(KNOWN))
    parser.add_argument("--agents", default=",".join(SETTINGS))
    parser.add_argument("--weights", default=",".join(RATES))
    parser.add_argument("--write", action="store_true", help="into docs/models.md, row by row")
    args = parser.parse_args()
    torch.set_num_threads(1)
    agents = args.agents.split(",")
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        for weights, family in product(args.weights.split(","), args.families.split(",")):
            if weights == "lora" and family in UNADAPTED:
                continue
            if not (root / family).exists():
                torch.manual_seed(0)
                KNOWN[family]().save_pretrained(root / family)
            made = cells(root / family, family, agents, weights, root)
            if args.write:
                write((family, weights), made)


if __name__ == "__main__":
    main()
