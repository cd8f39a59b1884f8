"""Short fine-tunings of tiny pipelines as arguments of the command, and the weights that they end in."""

from pathlib import Path
from typing import Any

import safetensors.torch
from tiny_pipelines import PROMPTS, SIDE
from torch import Tensor

AGENTS = {
    "ddpo": ("--agent", "ddpo", "--agent.kl_loss", 0.1),
    "grpo": ("--agent", "grpo"),
    "nft": ("--agent", "nft"),
    "draft": ("--agent", "draft"),
}


def run(cwd: Path, pipeline: Path, agent: str, lora: str, *more: Any) -> tuple[Any, ...]:
    """The arguments of ``finetune`` in ``cwd``, but for the ranks."""
    (cwd / "prompts.txt").write_text("\n".join(PROMPTS))
    given = {
        "--base": pipeline,
        "--pipeline.prompts": cwd / "prompts.txt",
        "--pipeline.size": SIDE.get(pipeline.name, 16),
        "--reward": "tiny_pipelines:warm",
        "--chain.steps": 2,
        "--chain.spacing": "trailing",
        "--rollout.prompts": 2,
        "--rollout.samples_per_prompt": 4,
        "--rollout.item": 3,
        "--evaluation.samples": 50,
        "--evaluation.deterministic": "false",
        "--monitor.every": 0,
        "--updates": 2,
        "--checkpoint_every": 1,
        "--learner.shares": 2,
        "--learner.exact": "true",
        "--device": "cpu",
        "--lora": lora,
        "--agent.micro_batch": 4,
    }
    return (*(text for pair in given.items() for text in pair), *AGENTS[agent], *more)


def weights(folder: Path) -> dict[str, Tensor]:
    """Of the network that a run has saved."""
    files = sorted(folder.glob("model/*.safetensors")) or sorted(folder.glob("model/[ut]*[tr]/*.safetensors"))
    return {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}
