"""Algorithms side by side: the same base model, budgets and judge; one TensorBoard, tables, plots, one page."""

from rlfusion.jobs.compare.brief import brief, ends
from rlfusion.jobs.compare.earlier import compare_runs
from rlfusion.jobs.compare.job import check, compare

__all__ = ["brief", "check", "compare", "compare_runs", "ends"]
