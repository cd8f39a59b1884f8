"""Losses as pure functions of tensors, one value a sample or a transition."""

from rlfusion.objectives.denoising import weighted_mse
from rlfusion.objectives.policy_gradient import clipped_surrogate, score_function

__all__ = ["clipped_surrogate", "score_function", "weighted_mse"]
