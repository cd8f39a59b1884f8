"""Pretrained text-to-image pipelines of diffusers as denoisers: one small file a family, all else common."""

from rlfusion.models.pipelines.adapters import LORA, is_lora
from rlfusion.models.pipelines.adapters import parse as parse_adapters
from rlfusion.models.pipelines.brought import by as brings
from rlfusion.models.pipelines.conditions import Conditions
from rlfusion.models.pipelines.continued import recorded as recorded_lora
from rlfusion.models.pipelines.continued import train_on
from rlfusion.models.pipelines.export import save
from rlfusion.models.pipelines.family import Family, Net
from rlfusion.models.pipelines.hub import FAMILIES, folder, index, is_pipeline, shape
from rlfusion.models.pipelines.hub import family as family_of
from rlfusion.models.pipelines.model import build, build_hollow, network_bytes, outline, placed
from rlfusion.models.pipelines.parity import Whole, published
from rlfusion.models.pipelines.prompts import Prompts
from rlfusion.models.pipelines.prompts import read as read_prompts
from rlfusion.models.pipelines.quantized import require_whole
from rlfusion.models.pipelines.scheduler import READERS, Sampling
from rlfusion.models.pipelines.settings import Settings, brought_scheduler, defaults

__all__ = [
    "FAMILIES",
    "LORA",
    "READERS",
    "Conditions",
    "Family",
    "Net",
    "Prompts",
    "Sampling",
    "Settings",
    "Whole",
    "brings",
    "brought_scheduler",
    "build",
    "build_hollow",
    "defaults",
    "family_of",
    "folder",
    "index",
    "is_lora",
    "is_pipeline",
    "network_bytes",
    "outline",
    "parse_adapters",
    "placed",
    "published",
    "read_prompts",
    "recorded_lora",
    "require_whole",
    "save",
    "shape",
    "train_on",
]
