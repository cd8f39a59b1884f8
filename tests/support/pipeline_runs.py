"""Fine-tuning of a tiny pipeline in this process."""

from pathlib import Path

from rlfusion.agents import AGENTS
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.config import Evaluations, Finetune, Rollout
from rlfusion.diffusion.chain import Chain
from rlfusion.jobs.finetune import check, finetune
from rlfusion.models import pipelines
from rlfusion.rl.monitor import Config as Monitoring

LORA = "LoRA(rank=4, alpha=8.0)"
STEPS, SIDE = 3, 16


def settings(folder: Path, agent: str, root: Path, **changes) -> Finetune:
    fast = {"lr": 1e-2, "updates_per_epoch": 2, "micro_batch": 64}
    walked = {"lr": 2e-3, "epochs": 4, "updates_per_epoch": 1, "kl_loss": 0.0}
    own = {"ddpo": walked, "grpo": walked, "draft": {}, "refl": {}}
    small = {
        "base": str(folder),
        "root": str(root),
        "pipeline": pipelines.Settings(prompts=str(root / "prompts.txt"), size=SIDE),
        "reward": "tiny_pipelines:warm",
        "chain": Chain(steps=STEPS, spacing="model", guidance_scale=2.0),
        "rollout": Rollout(prompts=2, samples_per_prompt=12, item=24),
        "monitor": Monitoring(every=0),
        "evaluation": Evaluations(samples=50),
        "updates": 4,
        "agent": AGENTS[agent](**fast | own[agent]),
    }
    return Finetune(**{**small, **changes})


def ran(config: Finetune, name: str) -> dict:
    check(config)
    folder = Path(config.root) / name
    folder.mkdir()
    return finetune(config, folder, Signals(), Progress())


def gain(result: dict) -> float:
    """How far the reward rose, in standard deviations of the base model's."""
    return (result["after"]["reward"] - result["before"]["reward"]) / result["before"]["reward_std"]
