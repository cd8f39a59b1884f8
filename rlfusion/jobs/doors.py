"""Every registry by the word that ``rlfusion list`` knows it by."""

from rlfusion.agents import AGENTS
from rlfusion.common.registry import Registry
from rlfusion.data.sources import SOURCES
from rlfusion.diffusion.chain import KERNELS
from rlfusion.diffusion.parameterization import KINDS
from rlfusion.distill import METHODS
from rlfusion.evaluation.extractors import EXTRACTORS
from rlfusion.evaluation.metrics import METRICS
from rlfusion.models import NETS, SCHEDULES
from rlfusion.models.pipelines import FAMILIES
from rlfusion.pretrain import LOSSES
from rlfusion.rewards import REWARDS
from rlfusion.training.optimizers import OPTIMIZERS
from rlfusion.training.trackers import TRACKERS

DOORS: dict[str, tuple[Registry, str]] = {
    "agents": (AGENTS, "finetune --agent"),
    "rewards": (REWARDS, "finetune --reward"),
    "kernels": (KERNELS, "--chain.kernel"),
    "schedules": (SCHEDULES, "pretrain --model.schedule"),
    "kinds": (KINDS, "pretrain --model.kind"),
    "objectives": (LOSSES, "pretrain --train.loss"),
    "methods": (METHODS, "distill --method"),
    "networks": (NETS, "pretrain --model.net"),
    "families": (FAMILIES, "finetune --pipeline.family"),
    "data": (SOURCES, "pretrain --data"),
    "optimizers": (OPTIMIZERS, "finetune --agent.optimizer"),
    "metrics": (METRICS, "evaluate --evaluation.metrics"),
    "extractors": (EXTRACTORS, "evaluate --features"),
    "trackers": (TRACKERS, "finetune --track"),
}
"""Each registry, and the option that takes a name of it."""
