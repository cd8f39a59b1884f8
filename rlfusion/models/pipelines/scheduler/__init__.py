"""Schedulers of diffusers, read as schedules, kinds, kernels and time grids."""

from rlfusion.models.pipelines.scheduler.readers import READERS, REFUSED, Sampling, read

__all__ = ["READERS", "REFUSED", "Sampling", "read"]
