"""Quality measures against scipy, closed forms, brute force and numbers worked by hand."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.data import Dataset
from rlfusion.evaluation import (
    class_spread,
    frechet_distance,
    frechet_gaussian,
    image_statistics,
    precision_recall,
    report,
    require_independent,
)
from rlfusion.evaluation.frechet import symmetric_root
from rlfusion.nets.classifier import Classifier
from rlfusion.rewards import WeightedSum, ink


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scipy_frechet(a, b):
    """The formula of Heusel et al. as pytorch-fid computes it."""
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = scipy.linalg.sqrtm(ca @ cb).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * cross)


# --- Frechet ---


def test_frechet_equals_scipy():
    mix = torch.randn(6, 6, generator=generator(1), dtype=torch.float64)
    a = torch.randn(200, 6, generator=generator(2), dtype=torch.float64) @ mix + 1
    b = torch.randn(150, 6, generator=generator(3), dtype=torch.float64)
    assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a.numpy(), b.numpy()), rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(frechet_distance(a, b), rel=1e-5)


def test_frechet_of_gaussians_in_closed_form():
    """Commuting covariances: |m|^2 + sum (sqrt l_a - sqrt l_b)^2."""
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator(4), dtype=torch.float64))
    la, lb = torch.tensor([1.0, 4.0, 9.0, 0.0]).double(), torch.tensor([4.0, 4.0, 1.0, 0.25]).double()
    ma, mb = torch.zeros(4).double(), torch.tensor([1.0, 2.0, 0.0, -2.0]).double()
    distance = frechet_gaussian(ma, rotation * la @ rotation.T, mb, rotation * lb @ rotation.T)
    assert distance == pytest.approx(9 + 1 + 0 + 4 + 0.25, rel=1e-7)


def test_frechet_of_a_set_to_itself_and_to_its_shift():
    a = torch.randn(100, 3, generator=generator())
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 2) == pytest.approx(12, rel=1e-5)
    flat = torch.cat([a, torch.zeros(100, 2)], 1)  # singular covariance, as dead features give
    assert frechet_distance(flat, flat + 2) == pytest.approx(20, rel=1e-5)
    assert frechet_distance(a[:, :1], a[:, :1] + 2) == pytest.approx(4, rel=1e-5)


def test_symmetric_root_squares_back_and_is_symmetric():
    half = torch.randn(5, 3, generator=generator(), dtype=torch.float64)
    root = symmetric_root(half @ half.T)
    torch.testing.assert_close(root @ root, half @ half.T)
    torch.testing.assert_close(root, root.T)


def test_frechet_refuses_bad_features():
    a = torch.randn(10, 3)
    with pytest.raises(ConfigError, match=r"\(10, 3\) and \(10, 2\)"):
        frechet_distance(a, a[:, :2])
    with pytest.raises(ConfigError, match="N, M >= 2"):
        frechet_distance(a, a[:1])
    a[4, 1] = math.nan
    with pytest.raises(NumericalError, match="1 of 10 samples are not finite, first of row 4"):
        frechet_distance(torch.randn(10, 3), a)


# --- precision, recall, spread ---


def test_precision_and_recall_by_hand():
    """On a line, k = 1. Real 0 1 3: radii 1 1 2. Samples 0.5 5 7 9.5: radii 4.5 2 2 2.5."""
    real, samples = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [5.0], [7.0], [9.5]])
    result = precision_recall(samples, real, k=1)
    assert result.precision == 0.5  # 0.5 in the ball of 0, 5 on the edge of that of 3; 7 and 9.5 in none
    assert result.recall == 1.0
    assert precision_recall(real, samples, k=1) == (1.0, 0.5)  # the two change places
    far = precision_recall(samples + 100, real, k=1)
    assert far == (0.0, 0.0)


def brute(queries, points, k):
    inside = 0
    for q in queries:
        radii = [sorted(np.linalg.norm(p - o) for o in points)[k] for p in points]
        inside += any(np.linalg.norm(q - p) <= r for p, r in zip(points, radii))
    return inside / len(queries)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_precision_and_recall_equal_brute_force_for_any_chunk(chunk):
    a = torch.randn(40, 3, generator=generator(1), dtype=torch.float64)
    b = 0.6 * torch.randn(30, 3, generator=generator(2), dtype=torch.float64) + 2.0
    precision, recall = precision_recall(a, b, k=3, chunk=chunk)
    assert precision == brute(a.numpy(), b.numpy(), 3)
    assert recall == brute(b.numpy(), a.numpy(), 3)
    assert 0 < precision < 1
    assert 0 < recall < 1


def test_precision_and_recall_see_collapse_and_outliers():
    real = torch.randn(300, 4, generator=generator(1))
    collapsed = 0.05 * torch.randn(300, 4, generator=generator(2))
    spread = 6 * torch.randn(300, 4, generator=generator(3))
    assert precision_recall(collapsed, real).precision > 0.95
    assert precision_recall(collapsed, real).recall < 0.05
    assert precision_recall(spread, real).precision < 0.1


def test_precision_and_recall_refuse_too_few_points():
    with pytest.raises(ConfigError, match="k = 3: expected 1 <= k < 3"):
        precision_recall(torch.rand(9, 2), torch.rand(3, 2))
    with pytest.raises(ConfigError, match=r"\(9, 2\) and \(9, 3\)"):
        precision_recall(torch.rand(9, 2), torch.rand(9, 3))


def test_class_spread_by_hand():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0], [9.0, 9.0], [1.0, 1.0], [1.0, 3.0]])
    label = torch.tensor([2, 2, 2, 5, 0, 0])
    assert class_spread(features, label) == {0: 2.0, 2: pytest.approx((5 + 4 + 3) / 3)}


# --- image statistics ---


def test_image_statistics_by_hand():
    flat = torch.full((1, 8, 8), 0.3)
    halves = torch.zeros(1, 8, 8)
    halves[:, :, 4:] = 1
    checks = (torch.arange(8)[:, None] + torch.arange(8))[None] % 2 * 1.0
    levels = (torch.arange(64).reshape(1, 8, 8) % 16 + 0.5) / 16
    statistics = image_statistics(torch.stack([flat, halves, checks, levels]))
    assert statistics.brightness.tolist() == pytest.approx([0.3, 0.5, 0.5, 0.5])
    assert statistics.edge_density[:3].tolist() == pytest.approx([0, 8 / 64, 63 / 64])
    assert statistics.entropy.tolist() == pytest.approx([0, 1, 1, 4], abs=1e-6)


def test_edges_below_the_threshold_do_not_count_and_rows_count():
    step = torch.zeros(2, 1, 8, 8)
    step[0, :, 4:] = 0.2
    step[1, :, 4:] = 0.3
    assert image_statistics(step).edge_density.tolist() == pytest.approx([0, 8 / 64])


def test_entropy_is_the_mean_over_channels():
    x = torch.zeros(1, 3, 8, 8)
    x[:, 0, :, 4:] = 1.0
    assert image_statistics(x).entropy.item() == pytest.approx(1 / 3)


# --- the report ---


class Mean(nn.Module):
    """A judge that can be read: features are the two halves' brightness; class 1 if the right one is brighter."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])

    def features(self, x):
        return torch.stack([x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))], 1)


def halves(count, seed, other=0.2):
    """Images whose half ``label`` is bright."""
    label = torch.arange(count) % 2
    level = other * torch.rand(count, 2, generator=generator(seed))
    level[torch.arange(count), label] += 0.7
    return level.repeat_interleave(4, 1)[:, None, None].expand(count, 1, 8, 8).clone(), label


def as_data(pixels, label):
    return Dataset(2 * pixels - 1, label, ("left", "right"))


def test_report_of_samples_like_the_data():
    real, floor = as_data(*halves(60, 1)), as_data(*halves(80, 2))
    x, label = halves(50, 3)
    label[:5] = 1 - label[:5]
    result = report(x, label, Mean(), real, floor)
    judge = Mean()
    pixels = [judge.features(part) for part in (x, (real.x + 1) / 2, (floor.x + 1) / 2)]
    assert result.count == 50
    assert result.agreement == pytest.approx(0.9)
    assert result.agreement_real == 1.0
    assert result.frechet == pytest.approx(scipy_frechet(pixels[0].numpy(), pixels[1].numpy()), abs=1e-6)
    assert result.frechet_floor == pytest.approx(scipy_frechet(pixels[2].numpy(), pixels[1].numpy()), abs=1e-6)
    assert (result.precision, result.recall) == precision_recall(pixels[0], pixels[1])
    assert result.diversity == pytest.approx(sum(class_spread(pixels[0], label).values()) / 2)
    assert result.diversity_real == pytest.approx(sum(class_spread(pixels[1], real.label).values()) / 2)
    assert result.brightness == pytest.approx(x.mean().item())
    assert result.brightness_real == pytest.approx(((real.x + 1) / 2).mean().item())


def test_report_sees_collapse_and_darkness():
    real, floor = as_data(*halves(60, 1)), as_data(*halves(80, 2))
    x, label = halves(50, 3, other=0.0)
    result = report(x, label, Mean(), real, floor)
    assert result.agreement == 1.0
    assert result.diversity_relative < 0.01
    assert result.recall < 0.1
    assert result.frechet > 10 * result.frechet_floor
    dark = report(x / 2, label, Mean(), real, floor)
    assert dark.brightness == pytest.approx(result.brightness / 2)
    assert dark.precision == 0


def test_report_as_dict_holds_every_number_by_name():
    data = as_data(*halves(20, 1))
    table = report(*halves(20, 2), Mean(), data, data).as_dict()
    assert {"agreement", "frechet", "frechet_floor", "diversity_relative", "entropy_real"} <= set(table)
    assert all(isinstance(value, int | float) and math.isfinite(value) for value in table.values())


def test_report_counts_only_classes_that_samples_and_data_share():
    data = as_data(*halves(20, 1))
    x, label = halves(20, 2)
    left = label == 0
    result = report(x[left], label[left], Mean(), data, data)
    spread = class_spread(Mean().features((data.x + 1) / 2), data.label)
    assert result.diversity_real == pytest.approx(spread[0])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x[:, :, :4], y), ConfigError, r"expected \(B, 1, 8, 8\)"),
        (lambda x, y: (x, y[:3]), ConfigError, r"labels \(3,\)"),
        (lambda x, y: (x[:3], y[:3]), ConfigError, "B >= 4"),
        (lambda x, y: (2 * x - 1, y), ConfigError, r"expected pixels in \[0, 1\]"),
        (lambda x, y: (x / (torch.arange(20) != 7)[:, None, None, None] * 0, y), NumericalError, "item 7"),
        (lambda x, y: (x, torch.arange(20)), ConfigError, "two samples"),
    ],
)
def test_report_refuses(change, error, message):
    data = as_data(*halves(20, 1))
    with pytest.raises(error, match=message):
        report(*change(*halves(20, 2)), Mean(), data, data)


def test_a_judge_inside_the_reward_is_refused():
    judge, own = Classifier("conv", (1, 8, 8), 10), Classifier("mlp", (1, 8, 8), 10)
    require_independent(judge, own)
    require_independent(judge, ink)
    with pytest.raises(ConfigError, match="expected another network"):
        require_independent(judge, WeightedSum({"c": Classifier("conv", (1, 8, 8), 10)}, {"c": 1.0}))
