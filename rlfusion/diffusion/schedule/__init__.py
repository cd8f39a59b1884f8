"""Noise schedules: what a time means. ``x_t = alpha(t) x_0 + sigma(t) eps``, data at t = 0, noise at t = 1."""

from rlfusion.diffusion.schedule.base import Level, Schedule, diffused, level, time_of
from rlfusion.diffusion.schedule.paths import Geometric, Karras, Rectified, Trig
from rlfusion.diffusion.schedule.tables import Between, Power, ShiftedSNR, SquaredCosine, UnitPrior, prior_std
from rlfusion.diffusion.schedule.vp import DDPM, VP, Cosine, ScaledLinear
from rlfusion.diffusion.schedule.zero_snr import ZeroSNR

__all__ = [
    "DDPM",
    "VP",
    "Between",
    "Cosine",
    "Geometric",
    "Karras",
    "Level",
    "Power",
    "Rectified",
    "ScaledLinear",
    "Schedule",
    "ShiftedSNR",
    "SquaredCosine",
    "Trig",
    "UnitPrior",
    "ZeroSNR",
    "diffused",
    "level",
    "prior_std",
    "time_of",
]
