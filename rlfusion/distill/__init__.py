"""Distillation: a model of few steps from one of many, one file a method."""

from collections.abc import Mapping

from rlfusion.distill import add, cd, ct, dmd, guided_pd, lcm, pd, reflow, regression, scd, sds, vsd
from rlfusion.distill.base import Distiller, Method, Settings, Teaching
from rlfusion.distill.on_schedule import OnSchedule
from rlfusion.distill.stages import Stage, Staged, local_steps
from rlfusion.distill.student import Config as Student

METHODS: Mapping[str, type] = {
    "cd": cd.Config,
    "lcm": lcm.Config,
    "ct": ct.Config,
    "scd": scd.Config,
    "pd": pd.Config,
    "guided_pd": guided_pd.Config,
    "sds": sds.Config,
    "vsd": vsd.Config,
    "dmd": dmd.Config,
    "add": add.Config,
    "reflow": reflow.Config,
    "regression": regression.Config,
}
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
