"""Every family of pretrained pipelines under every kind of learner: the table in docs/models.md.

Tiny random pipelines of the tests, all weights, reward red above blue; the gain is that of the evaluation on fixed
seeds, in standard deviations of the base model's rewards. Each export is read back by diffusers, or its cell fails.

    python benchmarks/pipelines.py [--families sd,flux] [--agents ddpo,draft] [--write]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))

from tiny_pipelines import MAKERS  # noqa: E402

from rlfusion import pipelines  # noqa: E402
from rlfusion.agents import AGENTS  # noqa: E402
from rlfusion.chain import Chain  # noqa: E402
from rlfusion.config import Evaluation, Finetune, Rollout  # noqa: E402
from rlfusion.finetune import finetune  # noqa: E402
from rlfusion.monitor import Config as Monitoring  # noqa: E402
from rlfusion.progress import Progress  # noqa: E402
from rlfusion.run import Signals  # noqa: E402

DOC, BEGIN, END = ROOT / "docs" / "models.md", "<!-- table of benchmarks/pipelines.py -->", "<!-- end of the table -->"
WALKED = {"lr": 2e-3, "epochs": 4, "updates_per_epoch": 1, "kl_loss": 0.0}
SETTINGS = {
    "ddpo": WALKED,
    "grpo": WALKED,
    "nft": {"lr": 2e-3},
    "dpo": {"lr": 2e-3},
    "refl": {"lr": 1e-2, "updates_per_epoch": 2},
    "draft": {"lr": 1e-2, "updates_per_epoch": 2},
}
SIDE = {"sana": 32}
STEPS, UPDATES = 2, 6


def gain(folder: Path, family: str, agent: str, root: Path) -> float:
    """The gain of one run, in standard deviations of the base's rewards."""
    published = pipelines.defaults(str(folder), training=True)
    grid = {"spacing": "trailing"} if family in ("sd", "sdxl") else {}  # their last step has too little noise
    chain = Chain(**published | {"steps": STEPS, "guidance_scale": 1.5} | grid)
    config = Finetune(
        base=str(folder),
        root=str(root),
        pipeline=pipelines.Settings(prompts=str(root / "prompts.txt"), size=SIDE.get(family, 8)),
        reward="tiny_pipelines:warm",
        chain=chain,
        rollout=Rollout(prompts=2, samples_per_prompt=32, item=64),
        monitor=Monitoring(every=0),
        evaluation=Evaluation(samples=64, deterministic=False),
        updates=UPDATES,
        agent=AGENTS[agent](**SETTINGS[agent]),
    )
    place = root / f"{family}-{agent}"
    place.mkdir()
    result = finetune(config, place, Signals(), Progress())
    return (result["after"]["reward"] - result["before"]["reward"]) / result["before"]["reward_std"]


def table(families: list[str], agents: list[str], root: Path) -> str:
    """The table of all cells."""
    (root / "prompts.txt").write_text("a red cat\ntwo dogs, 3\n")
    lines = [f"| family | {' | '.join(agents)} |", f"|---|{'---|' * len(agents)}"]
    for family in families:
        torch.manual_seed(0)
        MAKERS[family]().save_pretrained(root / family)
        cells = []
        for agent in agents:
            begin = time.process_time()
            try:
                cells.append(f"{gain(root / family, family, agent, root):+.2f}")
            except Exception as error:  # the table says what did not run
                print(f"{family} {agent}: {type(error).__name__}: {error}", file=sys.stderr)
                cells.append("-")
            print(f"{family} {agent} {cells[-1]} ({time.process_time() - begin:.1f} CPU s)", flush=True)
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells, print the table, and write it if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(MAKERS))
    parser.add_argument("--agents", default=",".join(SETTINGS))
    parser.add_argument("--write", action="store_true", help="into docs/models.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        made = table(args.families.split(","), args.agents.split(","), Path(root))
    print(made)
    if args.write:
        text = DOC.read_text()
        before, rest = text.split(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
