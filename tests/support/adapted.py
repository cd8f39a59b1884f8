"""Small networks of random weights, and a policy with adapters."""

import torch

from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.kernel import DDIM
from rlfusion.diffusion.policy import Policy
from rlfusion.diffusion.schedule import Cosine
from rlfusion.models import lora
from rlfusion.nets.dit import DiT
from rlfusion.nets.mlp import ResidualMLP
from rlfusion.nets.unet import UNet

NETS = {
    "mlp": lambda: ResidualMLP((1, 8, 8), 10, width=16, depth=1),
    "unet": lambda: UNet((1, 8, 8), 10, width=8),
    "dit": lambda: DiT((1, 8, 8), 10, width=16, depth=1, heads=2),
}


def randomised(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    net = NETS[name]()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def policy_of(text: str = "LoRA(rank=2)") -> Policy:
    net = randomised("mlp")
    lora.attach(net, text)
    return Policy(Denoiser(net, Cosine(), "x0"), DDIM(1.0))
