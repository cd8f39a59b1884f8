"""``check-model`` on guidance, and on our sampler beside the pipeline's own code from the same noise.

A solver of several steps (PNDM, DPM-Solver of order 2) has no transition density: what we walk is its first-order form,
which ends elsewhere by construction. So our latents are held to diffusers with that form of the same scheduler, where a
difference is a fault; how far the solver itself ends from there is said, and is none.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from rlfusion import models
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.denoiser import Denoiser
from rlfusion.diffusion.sampling import sample
from rlfusion.jobs.check_reward import Finding
from rlfusion.models import pipelines


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, as a share of the largest number of ``b``."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item()


def guidance(chain: Chain, denoiser: Denoiser) -> Finding:
    """How ``denoiser`` is guided in ``chain``: a note where it is not."""
    if denoiser.weights is not None:
        return Finding("guidance", "ok", f"the network reads it: w = {chain.told:g}, a scale of {chain.told + 1:g}")
    scale = "" if chain.guidance_scale is None else f"guidance_scale = {chain.guidance_scale:g}"
    if denoiser.own is not None and not denoiser.own.guided:
        none = "none: this model reads no guidance weight and has no second answer"
        return Finding("guidance", "note", none + (scale and f"; {scale} changes nothing, as in diffusers"))
    if not chain.weight and scale:
        return Finding("guidance", "note", f"none: {scale}, and it acts above 1, as in diffusers")
    if not chain.weight:
        return Finding("guidance", "ok", "none asked for")
    return Finding("guidance", "ok", f"by two answers: w = {chain.weight:g}, a scale of {chain.weight + 1:g}")


def sampler(chain: Chain, denoiser: Denoiser, card: models.Card, noise: Tensor, label: Tensor, alike: float) -> Finding:
    """Our latents beside the pipeline's, for noise (B, K+1, C, h, w) and prompts (B,), on the pipeline's own sampler
    with the steps and the guidance of ``chain``; apart by more than ``alike`` of the largest they are wrong.
    """
    own = denoiser.own.sampling
    chain = replace(chain, spacing="model", kernel=own.kernel, last_noise=0.0, repeats=0)
    whole = pipelines.Whole(card.pipeline, noise.device)
    call = _call(chain, denoiser, whole.known)
    if isinstance(call, str):
        return Finding("sampler", "note", f"not compared with the pipeline's: {call}")
    z, exact = noise[:, : chain.steps + 1], card.pipeline["dtype"] == "float32"
    ours = sample(chain.policy(denoiser, card.names), z, chain.times(denoiser), label)

    def apart(scheduler: Any) -> float:
        theirs = whole.latents(card.names, label.tolist(), z, scheduler, **call)
        return gap(ours, theirs.to(ours))

    return _compared(own, apart, type(whole.pipe.scheduler).__name__, alike if exact else None)


def _call(chain: Chain, denoiser: Denoiser, known: Mapping[str, Any]) -> dict[str, float] | str:
    """The guidance of ``chain`` as parameters of a pipeline's call, of those ``known``; or why it has no such."""
    if (chain.guidance_low, chain.guidance_high) != (0.0, 1.0):
        return "its guidance acts at all times, expected no guidance_low and guidance_high"
    if chain.guidance_rescale and "guidance_rescale" not in known:
        return f"it knows no guidance_rescale (= {chain.guidance_rescale:g})"
    if denoiser.weights is None and chain.weight < 0:
        return f"its guidance acts above w = 0 alone (guidance = {chain.guidance:g})"
    rescale = {"guidance_rescale": chain.guidance_rescale} if chain.guidance_rescale else {}
    return {"guidance_scale": chain.told + 1, **rescale}


def _compared(own: pipelines.Sampling, apart: Callable[[Any], float], solver: str, alike: float | None) -> Finding:
    """What the distances say; with ``alike`` None, where the pipeline's latents are of low precision, nothing fails."""
    first = own.first_order
    same = apart(first() if first else None)
    message = f"{own.kernel}: the pipeline's latents differ by {same:.2g} of the largest"
    if first:
        message = (
            f"{own.kernel} is the first-order form of {solver}, a solver of several steps: run in that form the "
            f"pipeline's latents differ by {same:.2g} of the largest, by {solver} itself by {apart(None):.2g}"
        )
    if alike is not None and not same <= alike:
        return Finding("sampler", "FAILS", message)
    return Finding("sampler", "note" if first or alike is None else "ok", message)
