"""The sampler that adapters for few steps were distilled with, known by their name: LCM, TCD, Hyper, Lightning, Turbo.

No file of adapters says its scheduler, and with another one they make noise. A pipeline whose own scheduler is a flow
keeps it: adapters for few steps of a flow (Hyper-FLUX, FLUX.1-Turbo, Qwen-Image-Lightning) change the number of steps.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

from rlfusion.common.notices import say_once
from rlfusion.models.pipelines import adapters

OWN = "own"
"""As ``pipeline.scheduler``, that of the pipeline, whatever the adapters are called."""
TRAILING = "(timestep_spacing='trailing')"


class Brought(NamedTuple):
    """A scheduler, as ``hub.scheduler`` reads it, and the steps and guidance scale of its model card."""

    scheduler: str
    steps: int
    guidance_scale: float


KNOWN = {
    "lcm": Brought("LCMScheduler", 4, 1.0),
    "tcd": Brought("TCDScheduler", 4, 1.0),
    "hyper": Brought(f"DDIMScheduler{TRAILING}", 8, 1.0),
    "lightning": Brought(f"EulerDiscreteScheduler{TRAILING}", 4, 1.0),
    "turbo": Brought(f"EulerAncestralDiscreteScheduler{TRAILING}", 4, 1.0),
}
"""By the word in the name of a file, of its folder, or of the hub's repository that the folder is a copy of."""
STEPS = re.compile(r"(?<!\d)(\d+)[ _-]?steps?(?![a-z])")


def named(place: str) -> Brought | None:
    """What the adapters in a file or folder bring; None for those that are called nothing of ``KNOWN``."""
    path = Path(place)
    snapshot = next((part for part in path.parts if part.startswith("models--")), "")
    for text in (path.stem, path.parent.name, snapshot):
        words = [word for word in KNOWN if re.search(rf"(?<![a-z]){word}(?![a-z])", text.lower())]
        if words:
            count = STEPS.search(text.lower())
            return KNOWN[words[0]]._replace(**({"steps": int(count[1])} if count and int(count[1]) else {}))
    return None


def by(told: str, lora: str = "") -> tuple[str, Brought] | None:
    """The last adapters of those that are merged and the ones that are trained on, that bring a sampler; and it."""
    places = [one.file for one in adapters.parse(told)] + ([lora] if lora else [])
    found = [(place, held) for place in places if (held := named(place)) is not None]
    return found[-1] if found else None


def scheduler(told: str, merged: str, lora: str, own: Any) -> str:
    """The scheduler in the place of a pipeline's ``own``: the one that is told, else what adapters bring; "" for none.
    Adapters bring none to a flow.
    """
    if told:
        return "" if told == OWN else told
    found = by(merged, lora)
    if found is None or _flows(own):
        return ""
    place, held = found
    if type(own).__name__ == held.scheduler:
        return ""
    say_once(
        f"adapters {place!r}: by their name they are sampled by {held.scheduler} ({held.steps} steps, guidance_scale "
        f"{held.guidance_scale:g} unless told); --pipeline.scheduler NAME takes another, {OWN} the pipeline's own"
    )
    return held.scheduler


def _flows(own: Any) -> bool:
    return "FlowMatch" in type(own).__name__


def chain(merged: str, lora: str, own: Any) -> dict[str, Any]:
    """The steps and the guidance scale that adapters bring to a pipeline whose own scheduler is given, as settings of
    ``Chain``; {} for none. On a flow the guidance stays that of the pipeline.
    """
    found = by(merged, lora)
    if found is None:
        return {}
    return {"steps": found[1].steps} | ({} if _flows(own) else {"guidance_scale": found[1].guidance_scale})
