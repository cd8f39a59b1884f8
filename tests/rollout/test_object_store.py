"""What rollouts keep in Ray's object store: counted from real trajectories, and refused in one line."""

import pytest
import torch
from rollout_tasks import CLASSES, SHAPE, make_policy, make_recipe

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import Weights
from rlfusion.rollout import Local, plan, samples, transitions
from rlfusion.rollout.object_store import InFlight, answer_bytes
from rlfusion.rollout.wire import to_wire


def test_the_answer_to_an_item_is_as_large_as_what_crosses():
    (trajectory,) = Local(make_recipe().build()).collect(
        plan(0, 0, 3, 50, 150, CLASSES, 1), Weights.of(make_policy(), 1)
    )
    text, blob = to_wire(trajectory)
    latent = torch.Size(SHAPE).numel()
    assert answer_bytes(150, 4, latent, transitions()) == pytest.approx(len(text) + len(blob), rel=0.05)
    assert answer_bytes(150, 4, latent, samples(4)) < 0.3 * answer_bytes(150, 4, latent, transitions())


def test_what_fits_passes_and_what_does_not_is_said_in_a_line():
    flight = InFlight(frozen=10**8, weights=10**9, versions=3, answer=2 * 10**8, workers=8)
    assert flight.together == 4_700_000_000
    flight.require_room(4_700_000_000)
    with pytest.raises(ConfigError) as caught:
        flight.require_room(4_699_999_999)
    assert str(caught.value) == (
        "rollouts in flight take 4.7 GB of Ray's object store (3 versions of the weights of 1 GB, answers of 8 workers "
        "of 0.2 GB, frozen parts of 0.1 GB), and a node has 4.7 GB: expected a smaller rollout.item or rollout.lag, "
        "fewer workers, or ray start --object-store-memory BYTES"
    )
