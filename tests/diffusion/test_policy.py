"""What a step needs beside the network is made once for its time, and nothing of it is read back from a device."""

import torch
from counted import counting

from rlfusion.common.seeding import normal, stream
from rlfusion.diffusion import denoiser
from rlfusion.diffusion import policy as policy_module
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kernel import DDIM, apply
from rlfusion.diffusion.parameterization import predict
from rlfusion.diffusion.policy import Observation, Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.mlp import ResidualMLP


def made(offset: float) -> tuple[Policy, torch.Tensor, torch.Tensor]:
    """A policy and two times; another offset has nothing kept."""
    net = ResidualMLP((1, 4, 4), 2, width=8, depth=1)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return Policy(Denoiser(net, Cosine(offset), "v"), DDIM(1.0)), *torch.tensor([0.7, 0.4], dtype=torch.float64)


def test_a_step_makes_its_coefficients_at_its_first_call_alone():
    policy, t, s = made(0.0081)
    obs = Observation(torch.randn(2, 1, 4, 4), t, s, torch.tensor([0, 1]))
    counts = []
    for _ in range(3):
        with counting(torch.float64) as ops:
            policy(obs)
        counts.append(sum(ops.values()) - ops["aten._local_scalar_dense"])
    assert counts[0] > 10
    assert counts[1:] == [0, 0]


def test_a_shared_time_and_one_for_each_row_give_the_same_step():
    policy, t, s = made(0.0082)
    x, label = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 1])
    one, each = (policy(Observation(x, *times, label)) for times in ((t, s), (t.expand(3), s.expand(3))))
    torch.testing.assert_close(one.mean, each.mean)
    torch.testing.assert_close(one.std.expand(3), each.std.flatten())


def test_what_is_kept_for_a_device_is_not_read_back_from_it():
    """A tensor on "meta" has no value that could be read."""
    policy, t, s = made(0.0083)
    x, like = torch.empty(2, 1, 4, 4, device="meta"), (torch.float32, torch.device("meta"))
    for _ in range(2):
        shared = denoiser._shared("v", policy.schedule, t.item(), *like)
        prediction = predict(shared.solution, x, x)
        distribution = apply(policy_module._step(policy.kernel, policy.schedule, t.item(), s.item(), *like), prediction)
        assert distribution.log_prob(distribution.sample(x)).device.type == "meta"


def test_what_inference_made_first_serves_training():
    policy, t, s = made(0.0084)
    obs = Observation(torch.randn(2, 1, 4, 4), t, s, torch.tensor([0, 1]))
    with torch.inference_mode():
        policy(obs)
    policy(obs).mean.square().sum().backward()
    assert all(p.grad is not None for p in policy.parameters())


def test_streams_of_many_items_are_those_of_each():
    key = ("noise", 3, "chain")
    rows = normal(key, [5, 2**40], (3,))
    for row, item in zip(rows, (5, 2**40)):
        assert row.tolist() == stream(*key, item).standard_normal(3, dtype="float32").tolist()
    assert stream(7).integers(10**9) == stream(*(7,)).integers(10**9) != stream("7").integers(10**9)
