"""Algorithms side by side: the same base model, budgets and judge; one TensorBoard, one table, plots."""

from rlfusion.jobs.compare.job import check, compare

__all__ = ["check", "compare"]
