"""The settings of each command: frozen dataclasses, read from YAML and the command line, written back as YAML.

All counts are global (prompts, samples per prompt, updates per rollout): no result depends on the number of workers.
"""

from dataclasses import asdict
from typing import Any

import yaml

from rlfusion.config.autoencoder import Autoencode
from rlfusion.config.board import Board
from rlfusion.config.checks import CheckAgent, CheckModel, CheckReward, Reproduce
from rlfusion.config.clip import TrainClip
from rlfusion.config.compare import Compare
from rlfusion.config.compare_runs import CompareRuns
from rlfusion.config.distill import Distill, with_method
from rlfusion.config.finetune import Finetune, with_agent
from rlfusion.config.imports import ImportConfig
from rlfusion.config.models import Evaluate, Sample
from rlfusion.config.parts import Evaluation, Evaluations, Figures, Ray, Rollout
from rlfusion.config.pretrain import Base, Pretrain
from rlfusion.config.push import Push
from rlfusion.config.serve import Serve
from rlfusion.diffusion.chain import Chain

__all__ = [
    "Autoencode",
    "Base",
    "Board",
    "Chain",
    "CheckAgent",
    "CheckModel",
    "CheckReward",
    "Compare",
    "CompareRuns",
    "Distill",
    "Evaluate",
    "Evaluation",
    "Evaluations",
    "Figures",
    "Finetune",
    "ImportConfig",
    "Pretrain",
    "Push",
    "Ray",
    "Reproduce",
    "Rollout",
    "Sample",
    "Serve",
    "TrainClip",
    "to_yaml",
    "with_agent",
    "with_method",
]


def to_yaml(config: Any) -> str:
    """The complete settings as YAML that ``--config`` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
