"""The job of ``rlfusion finetune``: refused, made, run."""

from rlfusion.jobs.finetune.checks import check, require_reward
from rlfusion.jobs.finetune.run import finetune

__all__ = ["check", "finetune", "require_reward"]
