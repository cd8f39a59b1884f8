"""Algorithms side by side: the same base model, budgets and judge; one TensorBoard, one table, plots."""

from rlfusion.jobs.compare.job import check, compare
from rlfusion.jobs.compare.settings import Compare

__all__ = ["Compare", "check", "compare"]
