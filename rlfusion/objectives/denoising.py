"""Regression losses of denoising:  w |y_theta - y|^2, the mean over features."""

from torch import Tensor

from rlfusion.common.tensors import mean_features


def weighted_mse(prediction: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """weight (B,) times the mean squared error over features of (B, ...) tensors: (B,).

    Raises:
        ValueError: prediction and target differ in shape.
    """
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return weight * mean_features((prediction - target).square())
