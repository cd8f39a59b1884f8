"""A plain reward of pictures in colour, for ``rlfusion finetune --reward examples/emoji/colourful.py:colourful``."""

from torch import Tensor


def colourful(samples: Tensor, cond: Tensor) -> Tensor:
    """samples (B, 3, H, W) in [0, 1] -> (B,) in [0, 1]: the mean chroma, max - min of red, green and blue."""
    return (samples.amax(1) - samples.amin(1)).mean((1, 2))
