"""The objectives of pretraining by name, and the presets that make a whole recipe of one word.

A preset is settings: of the model (kind, schedule), of the loss, and of the chain that samples it. Each may be changed
beside it. What a preset should reach on digits is in docs/pretraining.md.
"""

from collections.abc import Mapping
from typing import Any

from rlfusion.common import spec
from rlfusion.common.registry import Registry
from rlfusion.pretrain.base import Loss

_MODULES = {
    "denoising": ("Denoising",),
    "score_matching": ("ESM", "ISM", "SSM"),
    "consistency": ("CT", "ICT"),
    "continuous": ("SCT",),
}

LOSSES = Registry(
    "pretraining loss",
    "rlfusion.objectives",
    {name: f"rlfusion.pretrain.{module}:{name}" for module, names in _MODULES.items() for name in names},
    Loss,
)


def make(loss: str) -> Loss:
    """The objective that a text writes.

    Raises:
        ConfigError: no such objective or setting.
    """
    return spec.parse(loss, LOSSES, "pretraining loss")


def _denoising(kind: str, schedule: str, loss: str = "Denoising()", **chain: Any) -> dict[str, Any]:
    return {
        "model.kind": kind,
        "model.schedule": schedule,
        "train.loss": loss,
        **{f"chain.{name}": value for name, value in chain.items()},
    }


def _consistency(kind: str, schedule: str, loss: str, lr: float, frequency: float, floor: float) -> dict[str, Any]:
    """One step without guidance, so no label is dropped; ``chain.steps`` 2 takes a second. The frequency is that of the
    network's time: with another network, give it too."""
    return {
        **_denoising(kind, schedule, loss, steps=1, kernel=f"Renoise(floor={floor})"),
        "model.net": f"ResidualMLP(width=128, depth=3, frequency={frequency})",
        "train.steps": 6000,
        "train.lr": lr,
        "train.label_dropout": 0.0,
        "train.ema": "Constant(decay=0.9995)",
    }


VLB_LEVELS = "Geometric(sigma_min=0.05, sigma_max=5.0)"
"""The bound depends on the ends of the path alone (Kingma et al. 2021); on these levels its weight varies least. The
least noise is about half a bin of the digits' grey levels: below it the decoder knows the value."""

PRESETS: Mapping[str, dict[str, Any]] = {
    "x0": _denoising("x0", "Cosine()"),
    "eps": _denoising("eps", "DDPM()"),
    "v": _denoising("v", "Cosine()"),
    "min_snr": _denoising("v", "Cosine()", "Denoising(weight='MinSNR(gamma=5.0)')"),
    "snr": _denoising("v", "DDPM()", "Denoising(weight='SNR()')"),
    "truncated_snr": _denoising("v", "Cosine()", "Denoising(weight='TruncatedSNR()', times='Uniform(margin=0.001)')"),
    "edm": _denoising(
        "EDM()", "Karras()", "Denoising(times='LogNormal(mean=-1.2, std=1.2)')", steps=40, kernel="DDIM(eta=1.0)"
    ),
    "flow": _denoising("flow", "Rectified()"),
    "flow_logit_normal": _denoising("flow", "Rectified()", "Denoising(times='LogitNormal()')"),
    "vlb": {
        **_denoising("EDM(sigma_data=0.75)", VLB_LEVELS, "Denoising(weight='VLB()')", steps=50),
        "train.steps": 5000,
    },
    "dsm": _denoising("score", "VP()", "Denoising(weight='SNR()', times='Uniform(margin=0.001)')"),
    "esm": _denoising("eps", "VP()", "ESM(times='Uniform(margin=0.001)')"),
    "ism": _denoising("eps", "VP()", "ISM(probes=4, times='Uniform(margin=0.001)')"),
    "ssm": _denoising("eps", "VP()", "SSM(times='Uniform(margin=0.001)')"),
    "ncsn": _denoising("eps", "Geometric(sigma_min=0.05, sigma_max=5.0)", repeats=20, kernel="Langevin(step=0.3)"),
    "trigflow": _denoising("TrigFlow()", "Trig()"),
    "ct": _consistency("CM(sigma_data=0.75)", "Karras()", "CT(s1=20)", 3e-3, 10.0, 0.002),
    "ict": _consistency(
        "CM(sigma_data=0.75)",
        "Karras()",
        "ICT(s1=40, mean=0.5, std=2.0, metric='PseudoHuber(c=0.03)')",
        *(1e-3, 10.0, 0.002),
    ),
    "sct": _consistency(
        "TrigFlow(sigma_data=0.75)",
        "Trig(sigma_data=0.75)",
        "SCT(times='Uniform()', rise=3000, c=1.0)",
        *(3e-4, 2.0, 0.0),
    ),
}
