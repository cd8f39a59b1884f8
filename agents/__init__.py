"""Algorithms: one file each, with its settings (``Config``) and its learner."""

from functools import partial

from rlfusion.common.named import named_settings
from rlfusion.common.registry import Registry
from rlfusion.rl.agent import Agent, Defaults

NAMES = ("ddpo", "grpo", "ppo", "awm", "nft", "dpo", "sft", "opd", "draft", "refl", "drwr", "qsm", "dawr")

AGENTS = Registry(
    "agent",
    "rlfusion.agents",
    {name: f"rlfusion.agents.{name}:Config" for name in NAMES},
    Agent,
    partial(named_settings, "agent", Agent, (Defaults,)),
)
"""The settings of each algorithm by name."""
