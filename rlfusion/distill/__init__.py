"""Distillation: a model of few steps from one of many, one file a method."""

from functools import partial

from rlfusion.common.named import named_settings
from rlfusion.common.registry import Registry
from rlfusion.distill.base import Distiller, Method, Settings, Teaching
from rlfusion.distill.on_schedule import OnSchedule
from rlfusion.distill.stages import Stage, Staged, local_steps
from rlfusion.distill.student import Config as Student

NAMES = ("cd", "lcm", "ct", "scd", "pd", "guided_pd", "sds", "vsd", "dmd", "add", "reflow", "regression")

METHODS = Registry(
    "method",
    "rlfusion.methods",
    {name: f"rlfusion.distill.{name}:Config" for name in NAMES},
    Method,
    partial(named_settings, "method", Method, ()),
)
"""The settings of each method by name."""

__all__ = [
    "METHODS",
    "Distiller",
    "Method",
    "OnSchedule",
    "Settings",
    "Stage",
    "Staged",
    "Student",
    "Teaching",
    "local_steps",
]
