"""Watching for reward hacking: samples on fixed seeds, beside those that the base model drew from the same noise.

    (1)  frechet_base     Frechet distance to the base's samples, in the judge's features
    (2)  diversity        mean distance between two samples of one prompt, over the base's
    (3)  agreement        share of samples that the judge, who is not the reward, takes for their prompt
    (4)  brightness, edge_density, entropy: how far the mean has moved, in standard deviations of the base's images
    (5)  held-out rewards, which nothing is trained on, and how far each has fallen below the base's, in standard
         deviations of the base's own
    (6)  kl               sum_t KL(p_theta(. | x_t) || p_base(. | x_t)) in nats a walk, at the states of the policy's
         walks; steps without noise have none, and a chain without noise has no kl

Without a judge (no data to train one on) there are no (1) and (3), and (2) is measured in thumbnails.

A reward that rises while these run away is being hacked: UniRL saw dark pixels go from .45 to .93 of the picture while
its author's reward check passed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlfusion.common.errors import ConfigError, require_not_negative, require_positive
from rlfusion.evaluation import agreement, class_spread, features, frechet_distance, image_statistics, thumbnails
from rlfusion.evaluation.gains import gain
from rlfusion.evaluation.report import Judge
from rlfusion.rewards import Reward, score, valid
from rlfusion.training.asking import asked


@dataclass(frozen=True)
class Config:
    """Settings of the monitor.

    Attributes:
        every: updates between probes; 0 is no probe.
        samples: number of samples of a probe, evenly over the classes.
        held_out: rewards to evaluate only, by name.
        diversity: alarm where diversity falls below this share of the base's.
        agreement: alarm where agreement falls by more than this.
        image: alarm where an image statistic moves by more standard deviations of the base's images.
        frechet_base: alarm above this distance to the base's samples; null for none.
        kl: alarm above so many nats a walk, Eq. (6); null for none.
        held_out_fall: alarm where the reward has risen and a held-out reward is below the base's by more than so many
            of its standard deviations.
        best: the metric (of the names above, or "reward") that chooses the best model, among probes without an alarm.
        patience: training stops after that many probes without a new best; 0 goes on to the end.
        stop: an alarm, too, stops the training; else it is written down only.
    """

    every: int = 4
    samples: int = 200
    held_out: tuple[str, ...] = ()
    diversity: float = 0.4
    agreement: float = 0.15
    image: float = 3.0
    frechet_base: float | None = None
    kl: float | None = None
    held_out_fall: float = 1.0
    best: str = "reward"
    patience: int = 0
    stop: bool = False

    def __post_init__(self) -> None:
        require_not_negative(self, "every", "diversity", "patience")
        require_positive(self, "agreement", "image", "held_out_fall")
        if self.samples < 50:
            raise ConfigError(f"samples = {self.samples}: expected at least 50")
        for name in ("frechet_base", "kl"):
            if (limit := getattr(self, name)) is not None and not limit > 0:
                raise ConfigError(f"{name} = {limit}: expected a number > 0, or null")
        if self.best not in (known := (*LOOKED_AT, TRAINED, *self.held_out)):
            raise ConfigError(f"best = {self.best}: expected one of {', '.join(known)}")


IMAGE = ("brightness", "edge_density", "entropy")
LOOKED_AT = ("agreement", "diversity", "frechet_base", *IMAGE)
TRAINED = "reward"


class Monitor:
    """Compares samples with the base model's."""

    def __init__(
        self,
        config: Config,
        judge: Judge | None,
        rewards: Mapping[str, Reward],
        base: Tensor,
        label: Tensor,
        max_failed: float | None = None,
    ) -> None:
        """``rewards`` are the trained one, named "reward", and those held out; ``base`` (B, C, H, W) the base model's
        samples for ``label`` (B,). With ``max_failed`` up to that share of a reward's values may fail.
        """
        self.config, self.judge, self.rewards, self.label = config, judge, rewards, label
        self.max_failed = max_failed
        self.base = self._features(base)
        self.spread = _spread(self.base, label)
        self.images = image_statistics(base)._asdict()
        self.agreement = agreement(judge, self.base, label) if judge else 0.0
        with torch.no_grad():
            self.scores = {name: self._scored(name, base) for name in rewards}

    def _features(self, x: Tensor) -> Tensor:
        """The features in which distances between samples are measured."""
        return features(self.judge, x) if self.judge else thumbnails(x)

    @torch.no_grad()
    def probe(self, samples: Tensor, kl: float | None = None) -> dict[str, float]:
        """Eq. (1) to (6) and the reward, by name, of samples (B, C, H, W) for the labels of the base's; ``kl`` is that
        of their walks.
        """
        ours, images = self._features(samples), image_statistics(samples)._asdict()
        metrics = {name: self._scored(name, samples).mean().item() for name in self.rewards}
        base = self.scores[TRAINED]
        metrics["gain"] = gain(metrics[TRAINED], base.mean().item(), base.std(correction=0).item())
        metrics["diversity"] = _spread(ours, self.label) / self.spread
        if self.judge:
            metrics["agreement"] = agreement(self.judge, ours, self.label)
            metrics["frechet_base"] = frechet_distance(ours, self.base)
        for name, was in self.images.items():
            std = was.std(correction=0).clamp(min=1e-6)
            metrics[name] = ((images[name].mean() - was.mean()) / std).item()
        return metrics if kl is None else metrics | {"kl": kl}

    def _scored(self, name: str, samples: Tensor) -> Tensor:
        """The values of one reward, without those that failed."""
        masked = self.max_failed is not None
        value = asked(lambda: score(self.rewards[name], samples, self.label, name, masked=masked))
        return value if self.max_failed is None else value[valid(value, name, self.max_failed)[0]]

    def alarms(self, metrics: dict[str, float]) -> list[str]:
        """One sentence for each metric that is out of its bounds."""
        c, found = self.config, []
        if metrics["diversity"] < c.diversity:
            found.append(f"diversity within a prompt is {metrics['diversity']:.2f} of the base model's")
        if self.judge and self.agreement - metrics["agreement"] > c.agreement:
            found.append(f"agreement fell from {self.agreement:.3f} to {metrics['agreement']:.3f}")
        if c.frechet_base is not None and metrics["frechet_base"] > c.frechet_base:
            found.append(f"the Frechet distance to the base's samples is {metrics['frechet_base']:.1f}")
        if c.kl is not None and metrics.get("kl", 0.0) > c.kl:
            found.append(f"the KL to the base is {metrics['kl']:.3g} nats a walk")
        for name in IMAGE:
            if abs(metrics[name]) > c.image:
                found.append(f"{name} moved by {metrics[name]:+.1f} standard deviations of the base's images")
        return found + self._fallen(metrics)

    def _fallen(self, metrics: dict[str, float]) -> list[str]:
        """The held-out rewards that fell while the trained one rose, Eq. (5)."""
        moved = {name: (metrics[name] - was.mean().item(), was.std(correction=0)) for name, was in self.scores.items()}
        if not moved[TRAINED][0] > 0:
            return []
        falls = {name: -by / max(std.item(), 1e-6) for name, (by, std) in moved.items() if name != TRAINED}
        return [
            f"held-out reward {name!r} fell by {fall:.1f} standard deviations of the base's while the reward rose"
            for name, fall in falls.items()
            if fall > self.config.held_out_fall
        ]


def _spread(of_samples: Tensor, label: Tensor) -> float:
    """Mean spread within a class, over the classes that have two samples."""
    spread = class_spread(of_samples, label)
    return sum(spread.values()) / len(spread)


@dataclass
class Best:
    """The best probe so far: its value, its update, and the number of probes since. It is saved with the run."""

    name: str
    value: float = -float("inf")
    step: int = -1
    since: int = 0

    def take(self, step: int, metrics: dict[str, float], alarmed: bool) -> bool:
        """Whether this probe is the best so far; for ``frechet_base`` the smallest is best."""
        value = -metrics[self.name] if self.name == "frechet_base" else metrics[self.name]
        better = value > self.value and not alarmed
        self.since = 0 if better else self.since + 1
        if better:
            self.value, self.step = value, step
        return better
