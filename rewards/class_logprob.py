"""class_logprob(x, c) = log softmax(f(x))_c, f a small classifier: does the sample show what was asked? Differentiable.

A network can be fooled by the samples that it scores, so quality is judged by another one (``rlfusion.evaluation``).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlfusion.common.errors import ConfigError
from rlfusion.evaluation.classifier import load
from rlfusion.nets.classifier import Classifier
from rlfusion.rewards.base import Learned, require_labels


class ClassLogProb(Learned):
    """Log-probability of the sample's class for a small classifier, which the state dict holds. Differentiable.

    Args:
        weights: a file that ``rlfusion.classifier.save`` wrote; None for an untrained MLP, to be given its weights by
            ``load_state_dict``.
        shape: (C, H, W) of the images and
        classes: number of classes of that untrained one, by default those of the digits. With ``weights`` the file
            says both, and one given here must agree.

    Raises:
        ConfigError: no readable classifier in ``weights``, or one of another shape or number of classes.
    """

    def __init__(
        self, weights: str | None = None, shape: Sequence[int] | None = None, classes: int | None = None
    ) -> None:
        super().__init__()
        if weights is None:
            self.classifier = Classifier("mlp", tuple(shape or (1, 8, 8)), classes or 10).eval().requires_grad_(False)
        else:
            self.classifier = load(Path(weights))
        for name, given, held in (
            ("shape", shape and tuple(shape), self.classifier.shape),
            ("classes", classes, self.classifier.classes),
        ):
            if given is not None and given != held:
                raise ConfigError(f"{name} = {given}: the classifier in {weights!r} has {held}")

    def blank(self) -> dict[str, Any]:
        """As ``Learned.blank``."""
        return {"weights": None, "shape": list(self.classifier.shape), "classes": self.classifier.classes}

    def forward(self, samples: Tensor, cond: Tensor) -> Tensor:
        """samples (B, C, H, W) in [0, 1], cond (B,) int64 in 0..classes-1 -> (B,), at most 0.

        Raises:
            ConfigError: the condition is no label, or one outside the classifier's classes ("no class" among them).
        """
        label = require_labels(cond, len(samples), self.classifier.classes, "class_logprob")
        return self.classifier(samples).log_softmax(1).gather(1, label[:, None])[:, 0]
