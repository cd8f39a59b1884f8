"""The course of a learning rate: factors of its peak by the number n = 0, 1, ... of the optimiser step.

    (1)  rise:    min(1, (n + 1) / (warmup + 1))
    (2)  cosine:  (1) times (1 + cos(pi n / total)) / 2,  which is 0 after ``total`` steps

``torch.optim.lr_scheduler.LambdaLR`` sets the rate by them (``Optimization.follow``).
"""

import math
from collections.abc import Callable

Factor = Callable[[int], float]


def rise(warmup: int) -> Factor:
    """Eq. (1): a linear rise over ``warmup`` steps, then 1."""
    return lambda n: min(1.0, (n + 1) / (warmup + 1))


def cosine(total: int, warmup: int = 0) -> Factor:
    """Eq. (2): a linear rise over ``warmup`` steps, and a cosine to 0 over ``total``."""
    rising = rise(warmup)
    return lambda n: rising(n) * 0.5 * (1 + math.cos(math.pi * n / total))
