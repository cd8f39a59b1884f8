"""Losses as pure functions of tensors, one value a sample or a transition."""

from rlfusion.objectives.adversarial import ADVERSARIAL, Adversarial, gradient_penalty
from rlfusion.objectives.denoising import weighted_mse
from rlfusion.objectives.distribution_matching import MATCHING, MatchingWeight, pull
from rlfusion.objectives.policy_gradient import (
    behaviour_weight,
    clipped_surrogate,
    effective_share,
    leads_away,
    masked_surrogate,
    score_function,
)

__all__ = [
    "ADVERSARIAL",
    "MATCHING",
    "Adversarial",
    "MatchingWeight",
    "behaviour_weight",
    "clipped_surrogate",
    "effective_share",
    "gradient_penalty",
    "leads_away",
    "masked_surrogate",
    "pull",
    "score_function",
    "weighted_mse",
]
