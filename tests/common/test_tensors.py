"""Small helpers on tensors."""

import math

import pytest
import torch

from rlfusion.common.tensors import all_finite


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(wrong):
    x = torch.randn(3, 1, 4, 4)
    assert all_finite(x)
    x[1, 0, 2, 3] = wrong
    assert not all_finite(x)
    x[2, 0, 0, 0] = -wrong  # whose sum with the other is no number
    assert not all_finite(x)


def test_finite_numbers_whose_sum_overflows_are_finite():
    assert all_finite(torch.full((3,), 3e38))
    assert all_finite(torch.empty(0))
