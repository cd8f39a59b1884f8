"""``rlfusion reproduce``: a work item that failed on every worker, run again in this process."""

from collections.abc import Iterator
from pathlib import Path

from rlfusion.common.errors import shorten
from rlfusion.common.numerics import differences, fingerprint
from rlfusion.common.user_code import blamed
from rlfusion.config import Reproduce
from rlfusion.rollout.bundle import Bundle, Raised
from rlfusion.training.devices import pick_device, set_numerics


def reproduce(settings: Reproduce) -> Iterator[str]:
    """Lines that say what failed, what differs here, and whether it fails alike.

    Raises:
        ConfigError: no bundle, or the device that it failed on is not here.
    """
    bundle = Bundle.read(Path(settings.bundle))
    config = bundle.recipe.config
    device = pick_device(config.get("device", "cpu") if settings.device == "auto" else settings.device)
    set_numerics(settings.threads or config.get("threads", 1), device)
    yield from _told(bundle)
    yield f"running it on {device}" + ("" if bundle.error.kind else "; it may end this process, too")
    yield from _verdict(bundle, str(device))


def _told(bundle: Bundle) -> Iterator[str]:
    yield f"{bundle.item} of run {bundle.run}, seed {bundle.item.seed}"
    if bundle.prompts:
        yield f"prompts: {shorten(', '.join(dict.fromkeys(bundle.prompts)), 300)}"
    for worker, how in bundle.workers.items():
        yield f"worker {worker} {shorten(how, 300)}"
    for text in differences(bundle.numerics, fingerprint()):
        yield f"other than where it was kept: {text}"


def _verdict(bundle: Bundle, device: str) -> Iterator[str]:
    try:
        walks = bundle.run_again(device)
    except Exception as error:  # of whatever kind: that is what is asked
        here, mine = Raised.of(error), blamed(error)
        alike = here == bundle.error
        yield f"it fails {'alike' if alike else 'otherwise'}: {here}"
        if not alike and bundle.error.kind:
            yield f"on the workers it was {bundle.error}"
        if mine is not None and mine.frames:
            yield mine.frames
        return
    rewards = "" if walks.reward is None else f", mean reward {walks.reward.mean().item():.6g}"
    yield f"it does not fail here: {len(walks)} walks{rewards}; look at the workers, their memory and their devices"
