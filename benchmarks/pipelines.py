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
from rlfusion.jobs.compare.curves import curve  # noqa: E402
from rlfusion.jobs.compare.job import slug  # noqa: E402
from rlfusion.models import pipelines  # noqa: E402

DOC, BEGIN, END = ROOT / "docs" / "models.md", "<!-- table of benchmarks/pipelines.py -->", "<!-- end of the table -->"
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
STEPS, WALKS, UPDATES = 2, 64, 6
ALIKE = 1e-4


def settings(folder: Path, family: str, agents: list[str], weights: str, root: Path) -> Compare:
    """The comparison of ``agents`` on a family."""
    published = pipelines.defaults(str(folder), training=True)
    grid = {"spacing": "trailing"} if family in ("sd", "sdxl") else {}  # their last step has too little noise
    low, high = RATES[weights]
    return Compare(
        agents=[f"{name} = {SETTINGS[name].replace('@@', high).replace('@', low)}" for name in agents],
        rewards=[REWARD],
        budget_queries=UPDATES * WALKS,
        evaluations=1,
        best_of=[],
        guidance=[],
        root=str(root),
        base=str(folder),
        pipeline=pipelines.Settings(prompts=str(root / "prompts.txt"), size=SIDE.get(family, 8)),
        lora=LORA[weights],
        chain=Chain(**published | {"steps": STEPS, "guidance_scale": 1.5} | grid),
        rollout=Rollout(prompts=2, samples_per_prompt=WALKS // 2, item=WALKS),
        evaluation=Evaluations(samples=64, deterministic=False),
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


def row(folder: Path, family: str, agents: list[str], weights: str, root: Path) -> str:
    """The row of a family and what is trained."""
    begin, place = time.process_time(), root / f"{family}-{weights}"
    place.mkdir()
    page = compare(settings(folder, family, agents, weights, root), place, Signals(), Progress())
    cells = []
    for agent in agents:
        run = place / slug(f"{agent}-{REWARD}-seed0")
        try:
            points, gap = curve(run), difference(run)
        except (OSError, ConfigError, NumericalError) as error:  # the table says what did not run
            print(f"{family} {weights} {agent}: {type(error).__name__}: {error}\n{page}", file=sys.stderr)
            cells.append("-")
            continue
        cells.append(f"{points[-1].gain:+.2f}" if gap <= ALIKE else f"export differs by {gap:.1g}")
        print(f"{family} {weights} {agent} {cells[-1]}; ours and diffusers' latents differ by {gap:.1g}", flush=True)
    print(f"{family} {weights}: {time.process_time() - begin:.0f} CPU s", flush=True)
    return f"| {family} | {weights} | {' | '.join(cells)} |"


def table(families: list[str], agents: list[str], weights: list[str], root: Path) -> str:
    """The table of all cells."""
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    lines = [f"| family | weights | {' | '.join(agents)} |", f"|---|---|{'---|' * len(agents)}"]
    for family in families:
        torch.manual_seed(0)
        (MAKERS | NEWER)[family]().save_pretrained(root / family)
        kinds = [kind for kind in weights if kind == "all" or family not in UNADAPTED]
        lines += [row(root / family, family, agents, kind, root) for kind in kinds]
    return "\n".join(lines)


def main() -> None:
    """Run the cells, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(MAKERS))
    parser.add_argument("--agents", default=",".join(SETTINGS))
    parser.add_argument("--weights", default=",".join(RATES))
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = (args.families.split(","), args.agents.split(","), args.weights.split(","))
    with tempfile.TemporaryDirectory() as root:
        made = table(*chosen, Path(root))
    print(made)
    if args.write:
        text = DOC.read_text()
        before, rest = text.split(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
