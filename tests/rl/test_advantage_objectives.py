"""Advantages and losses, with numbers worked by hand."""

import math

import pytest
import torch

from rlfusion.objectives import clipped_surrogate, score_function, weighted_mse
from rlfusion.rl.advantage import RunningAdvantage, group_moments, group_relative, normalize, pair


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_group_relative_by_hand():
    """Groups 5: rewards 1, 3 (mean 2, std 1); 2: rewards 0, 0, 6 (mean 2, std sqrt 8); 9: alone."""
    reward, group = tensor(1, 0, 3, 0, 6, 7), torch.tensor([5, 2, 5, 2, 2, 9])
    mean, std = group_moments(reward, group)
    torch.testing.assert_close(mean, tensor(2, 2, 2, 2, 2, 7))
    torch.testing.assert_close(std, tensor(1, 8**0.5, 1, 8**0.5, 8**0.5, 0))
    expected = tensor(-1, -2 / 8**0.5, 1, -2 / 8**0.5, 4 / 8**0.5, 0)
    torch.testing.assert_close(group_relative(reward, group), expected, rtol=1e-5, atol=0)


def test_a_group_of_equal_rewards_has_no_advantage_whatever_their_size():
    reward = torch.full((6,), 12345.678)
    assert torch.equal(group_relative(reward, torch.zeros(6, dtype=torch.int64)), torch.zeros(6))


def test_advantages_do_not_change_with_order_shift_or_scale_of_the_reward():
    g = torch.Generator().manual_seed(0)
    reward, group = torch.randn(40, generator=g).double(), torch.randint(4, (40,), generator=g)
    order = torch.randperm(40, generator=g)
    a = group_relative(reward, group)
    torch.testing.assert_close(group_relative(reward[order], group[order]), a[order])
    torch.testing.assert_close(group_relative(1e3 * reward - 5e4, group), a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [(torch.zeros(3, 1), torch.zeros(3)), (torch.zeros(3), torch.zeros(4))])
def test_shapes_are_checked(bad):
    with pytest.raises(ValueError, match="reward and group"):
        group_moments(*bad)


def test_running_advantage_keeps_a_window_for_each_group():
    """Window 3: after 1, 2 | 3, 7 group 0 holds 2, 3, 7 (mean 4, std sqrt(14/3)); group 1 has fewer than min_count."""
    rule = RunningAdvantage(window=3, min_count=3)
    first = rule(tensor(1, 2), torch.tensor([0, 0]))
    torch.testing.assert_close(first, tensor(-1, 1), rtol=1e-5, atol=0)  # by the batch: mean 1.5, std .5
    second = rule(tensor(3, 7, 5), torch.tensor([0, 0, 1]))
    assert rule.history[0].tolist() == [2, 3, 7]
    assert rule.history[1].tolist() == [5]
    expected = [-1 / (14 / 3) ** 0.5, 3 / (14 / 3) ** 0.5, 0.0]  # 5 is the mean of the batch
    torch.testing.assert_close(second, tensor(*expected), rtol=1e-5, atol=1e-12)


def test_running_advantage_is_saved_and_restored():
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(30, generator=g), torch.randint(3, (30,), generator=g)) for _ in range(4)]
    straight, resumed = RunningAdvantage(window=16), RunningAdvantage(window=16)
    for batch in batches[:2]:
        straight(*batch)
    resumed.load_state_dict(straight.state_dict())
    for batch in batches[2:]:
        assert torch.equal(straight(*batch), resumed(*batch))
    assert straight.state_dict().keys() == {"history"}
    assert all(isinstance(key, str) for key in straight.state_dict()["history"])


def test_normalize_by_hand():
    torch.testing.assert_close(normalize(tensor(5), tensor(2), tensor(0.5), eps=0.25), tensor(4))


def test_score_function_by_hand_and_its_gradient():
    log_prob, a = tensor(-2, 0.5).requires_grad_(), tensor(3, -4).requires_grad_()
    loss = score_function(log_prob, a)
    assert loss.tolist() == [6, 2]
    loss.sum().backward()
    assert log_prob.grad.tolist() == [-3, 4]
    assert a.grad is None


@pytest.mark.parametrize(
    ("ratio", "a", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # a good action made rarer: not clipped
        (1.5, -2.0, 3.0, 3.0),  # a bad action made likelier: not clipped
        (0.5, -2.0, 1.6, 0.0),  # clipped at .8
    ],
)
def test_clipped_surrogate_by_hand(ratio, a, loss, slope):
    """c = .2; ``slope`` is the derivative in log r."""
    log_ratio = tensor(math.log(ratio)).requires_grad_()
    got = clipped_surrogate(log_ratio, tensor(a), 0.2)
    assert got.item() == pytest.approx(loss)
    got.backward()
    assert log_ratio.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "a", "loss", "slope"),
    [
        (2.0, -1.0, 2.0, 2.0),
        (5.0, -1.0, 3.0, 0.0),
        (5.0, 1.0, -1.2, 0.0),
        (0.5, 1.0, -0.5, -0.5),
        (math.exp(200), -2.0, 6.0, 0.0),
    ],
)
def test_dual_clip_by_hand(ratio, a, loss, slope):
    """c = .2, c2 = 3: the loss of a negative advantage ends at 3 |A|, and an outlier has no gradient."""
    log_ratio = tensor(math.log(ratio)).requires_grad_()
    got = clipped_surrogate(log_ratio, tensor(a), 0.2, 3.0)
    assert got.item() == pytest.approx(loss)
    got.backward()
    assert log_ratio.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("dual_clip", [None, 1.5])
def test_the_slope_of_the_clipped_surrogate_is_that_of_its_parts_to_the_bit(dual_clip):
    g = torch.Generator().manual_seed(0)
    log_ratio = 0.3 * torch.randn(400, generator=g)
    log_ratio[:50], log_ratio[50:60] = 0.0, torch.tensor(1.2).log()  # on policy, and where the clip begins
    a, weight = torch.randn(400, generator=g), torch.randn(400, generator=g)
    a[60:70] = 0.0

    def parts(x: torch.Tensor) -> torch.Tensor:
        ratio = (x if dual_clip is None else x.clamp(max=math.log(dual_clip))).exp()
        return -(ratio * a).minimum(ratio.clamp(0.8, 1.1) * a)

    log_ratio.requires_grad_()
    both = [clipped_surrogate(log_ratio, a, (0.2, 0.1), dual_clip), parts(log_ratio)]
    assert torch.equal(*both)
    assert torch.equal(*(torch.autograd.grad((weight * loss).sum(), log_ratio)[0] for loss in both))


@pytest.mark.parametrize(("clip", "a"), [((0.2, 0.0), 1.0), ((0.0, 0.2), -1.0), ((0.2, 0.0), -1.0), ((0.0, 0.2), 1.0)])
def test_a_ratio_that_is_a_limit_itself_is_not_held(clip, a):
    log_ratio = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    clipped_surrogate(log_ratio, torch.tensor([a], dtype=torch.float64), clip).sum().backward()
    assert log_ratio.grad.item() == -a


def test_it_has_the_slope_under_torch_func_and_batches():
    torch.manual_seed(0)
    log_ratio, a = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)

    def loss(y):
        return clipped_surrogate(y, a, 0.2, 1.5).sum()

    leaf = log_ratio.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.equal(torch.func.grad(loss)(log_ratio), leaf.grad)
    rows = torch.func.vmap(torch.func.grad(loss))(torch.stack([log_ratio, -log_ratio]))
    assert torch.equal(rows[0], leaf.grad)


def test_the_second_derivative_of_the_clipped_surrogate_is_its_finite_difference():
    x = torch.linspace(-0.9, 0.95, 12, dtype=torch.float64).requires_grad_()
    a = torch.tensor([1.0, -2.0], dtype=torch.float64).repeat(6)
    assert torch.autograd.gradgradcheck(lambda y: clipped_surrogate(y, a, 0.2, 2.0), x)


def test_pairs_are_those_of_each_prompt_by_itself():
    g = torch.Generator().manual_seed(1)
    group = torch.tensor([7, 2, 2, 7, 5, 2, 7, 7, 5, 2, 2, 9])[torch.randperm(12, generator=g)]
    for share in (0.2, 0.34, 0.5):
        reward = torch.randint(0, 4, (12,), generator=g).float()
        expected = []
        for prompt in (2, 5, 7, 9):
            rows = [i for i in range(12) if group[i] == prompt]
            order = sorted(rows, key=lambda i: -reward[i])
            expected += list(zip(order, order[::-1]))[: int(share * len(rows))]
        found = [part.tolist() for part in pair(reward, group, share)]
        assert list(zip(*found)) == [(w, l) for w, l in expected if reward[w] > reward[l]]


@pytest.mark.parametrize("loss", [score_function, lambda x, a: clipped_surrogate(x, a, 0.2)])
@pytest.mark.parametrize("shapes", [((3,), (3, 1)), ((3,), (4,)), ((), ()), ((2, 2), (2, 2))])
def test_losses_check_their_ranks(loss, shapes):
    with pytest.raises(ValueError, match=r"\(N,\)"):
        loss(*map(torch.zeros, shapes))


def test_weighted_mse_is_a_mean_over_features():
    x, y = torch.zeros(2, 1, 1, 4), torch.tensor([[1.0, 2, 3, 0], [2, 0, 0, 0]])[:, None, None]
    assert weighted_mse(x, y).tolist() == [3.5, 1.0]
    assert weighted_mse(x, y, torch.tensor([2.0, 0.5])).tolist() == [7.0, 0.5]
    with pytest.raises(ValueError, match="shape"):
        weighted_mse(x, y[0])
