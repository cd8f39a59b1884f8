"""Algorithms: one file each, with its settings (``Config``) and its learner."""

from collections.abc import Mapping

from rlfusion.agents import ddpo, grpo

AGENTS: Mapping[str, type] = {"ddpo": ddpo.Config, "grpo": grpo.Config}
"""The settings of each algorithm by name."""
