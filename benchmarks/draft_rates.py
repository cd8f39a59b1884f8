"""What `draft` learns on tiny pipelines at several learning rates, on adapters and on all weights: its defaults there.

Red above blue, 5 steps under a guidance scale of 1.5, 4 walks of each of two prompts, 12 rollouts of 4 updates. Gain
is in standard deviations of the base's rewards, diversity within a prompt over the base's, on fixed seeds.

    python benchmarks/draft_rates.py [--families sd,sdxl,sd3,flux] [--out benchmarks/results/draft-rates-cpu.json]
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pipelines import KNOWN, PROMPTS, REWARD, UNADAPTED, run_of, settings

from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Rollout
from rlfusion.jobs.compare import compare
from rlfusion.jobs.curves import curve

RATES = {"lora": ("1e-4", "3e-4", "1e-3", "3e-3", "1e-2"), "all": ("1e-5", "1e-4", "3e-4", "1e-3")}
ADAPTERS = {"lora": "LoRA(rank=8)", "all": ""}
REWARDS, STEPS = 96, 5


def rows(folder: Path, weights: str, root: Path) -> list[dict[str, Any]]:
    """What is reached on the pipeline in ``folder`` at each rate."""
    place = root / f"{folder.name}-{weights}"
    place.mkdir()
    usual = settings(folder, folder.name, ["draft"], weights, root, 1)
    config = replace(
        usual,
        agents=[f"at {rate} = draft(lr={rate})" for rate in RATES[weights]],
        lora=ADAPTERS[weights],
        rollout=Rollout(prompts=len(PROMPTS), samples_per_prompt=4, item=8),
        budget_queries=REWARDS,
        chain=replace(usual.chain, steps=STEPS),
    )
    compare(config, place, Signals(), Progress())
    found = []
    for rate in RATES[weights]:
        end = curve(place / run_of(f"at {rate}", 0))[-1]
        told = {"gain": round(end.gain, 4), "diversity": round(end.diversity or 0.0, 4)}
        found.append({"family": folder.name, "weights": weights, "lr": rate, "reward": REWARD, **told})
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Run all, print them, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default="sd,sdxl,sd3,flux")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "prompts.txt").write_text("\n".join(PROMPTS))
        for family in args.families.split(","):
            torch.manual_seed(0)
            KNOWN[family]().save_pretrained(root / family)
            for weights in RATES:
                if weights == "all" or family not in UNADAPTED:
                    found += rows(root / family, weights, root)
    if args.out:
        args.out.write_text(json.dumps({"torch": torch.__version__, "runs": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
