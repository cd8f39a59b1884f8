"""Pretrained text-to-image pipelines of diffusers as denoisers: one small file a family, all else common."""

from rlfusion.pipelines.conditions import Conditions
from rlfusion.pipelines.export import save
from rlfusion.pipelines.family import Family, Net
from rlfusion.pipelines.hub import FAMILIES, folder, index, is_pipeline, shape
from rlfusion.pipelines.model import LORA, build, placed
from rlfusion.pipelines.parity import Whole, published
from rlfusion.pipelines.prompts import Prompts
from rlfusion.pipelines.prompts import read as read_prompts
from rlfusion.pipelines.scheduler import READERS, Sampling
from rlfusion.pipelines.settings import Settings, defaults

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
    "build",
    "defaults",
    "folder",
    "index",
    "is_pipeline",
    "placed",
    "published",
    "read_prompts",
    "save",
    "shape",
]
