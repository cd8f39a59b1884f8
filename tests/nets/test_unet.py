"""The U-Net: its call, what it depends on, attention, refusals."""

import pytest
import torch
from rounding import ROUNDING

from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.schedule import Cosine
from rlfusion.nets.unet import Attention, UNet

SMALL = {"width": 8, "multipliers": (1, 2), "depth": 1, "attention": (1,)}


def unet(shape=(3, 8, 8), **settings) -> UNet:
    """With weights that are nowhere 0, so that every path counts."""
    torch.manual_seed(0)
    net = UNet(shape, classes=4, **SMALL | settings)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def inputs(n=3, shape=(3, 8, 8)):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=g), torch.rand(n, generator=g), torch.arange(n) % 5


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (4, 4, 12)])
def test_it_answers_in_the_shape_of_x_and_starts_at_zero(shape):
    assert unet(shape)(*inputs(shape=shape)).shape == (3, *shape)
    fresh = UNet(shape, classes=4, **SMALL)
    assert fresh(*inputs(shape=shape)).count_nonzero() == 0


def test_rows_are_independent_and_time_and_class_matter():
    net, (x, t, label) = unet(), inputs()
    y = net(x, t, label)
    torch.testing.assert_close(net(x[1:2], t[1:2], label[1:2]), y[1:2], **ROUNDING)
    assert ((net(x, t + 0.1, label) - y).abs().amax((1, 2, 3)) > 1e-4).all()
    assert ((net(x, t, (label + 1) % 5) - y).abs().amax((1, 2, 3)) > 1e-4).all()


def test_every_pixel_sees_every_pixel_and_every_weight_learns():
    net, (x, t, label) = unet(), inputs()
    x.requires_grad_()
    net(x, t, label)[0, 0, 0, 0].backward()
    assert (x.grad[0] != 0).all()
    net.zero_grad()
    net(*inputs(5)).square().sum().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize("attention", [(), (0,), (1,), (2,), (0, 1, 2)])
def test_it_attends_at_any_level_with_any_batch(attention):
    net = unet(multipliers=(1, 2, 5), attention=attention)
    y = net(*inputs(5))
    for n in (1, 3):
        torch.testing.assert_close(net(*(i[:n] for i in inputs(5))), y[:n], rtol=1e-4, atol=1e-4)
    attends = [m.heads for m in net.modules() if isinstance(m, Attention)]
    assert len(attends) == 1 + 3 * len(attention)


def test_it_runs_in_bfloat16():
    net, batch = unet(), inputs()
    x, t, label = batch
    low = unet().bfloat16()(x.bfloat16(), t, label)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), net(*batch), rtol=0.1, atol=0.3)


def test_it_is_the_network_of_a_denoiser():
    x, _, label = inputs()
    prediction = Denoiser(unet(), Cosine(), "v")(x, torch.tensor(0.3, dtype=torch.float64), label)
    assert prediction.x0.shape == prediction.eps.shape == x.shape


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"shape": (3, 7, 8)}, "multiples of 2"),
        ({"shape": (8, 8)}, r"\(C, H, W\)"),
        ({"width": 12}, "width = 12"),
        ({"attention": (2,)}, "attention"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"multipliers": (), "attention": ()}, "a level or more"),
        ({"depth": 0}, "depth = 0"),
    ],
)
def test_impossible_settings_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        unet(**settings)
