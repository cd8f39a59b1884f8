"""Algorithms side by side: the same base model, budgets and judge; one TensorBoard, one table, plots."""

from rlfusion.comparison.job import check, compare
from rlfusion.comparison.settings import Compare

__all__ = ["Compare", "check", "compare"]
