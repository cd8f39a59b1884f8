"""Algorithms: one file each, with its settings (``Config``) and its learner."""

from collections.abc import Mapping

from rlfusion.agents import dawr, ddpo, dpo, draft, drwr, grpo, nft, qsm, refl

AGENTS: Mapping[str, type] = {
    "ddpo": ddpo.Config,
    "grpo": grpo.Config,
    "nft": nft.Config,
    "dpo": dpo.Config,
    "draft": draft.Config,
    "refl": refl.Config,
    "drwr": drwr.Config,
    "qsm": qsm.Config,
    "dawr": dawr.Config,
}
"""The settings of each algorithm by name."""
