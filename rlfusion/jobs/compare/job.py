"""The job of ``rlfusion compare``: the runs one after another, each resumable, then the report."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlfusion import models
from rlfusion.common import storage
from rlfusion.common.errors import ConfigError, NumericalError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.common.weights import sha256
from rlfusion.config import Finetune, to_yaml
from rlfusion.config.compare import Compare, shown
from rlfusion.jobs import base_model as origin
from rlfusion.jobs import finetune
from rlfusion.jobs.compare.baselines import Measured, Tries, baselines
from rlfusion.jobs.compare.curves import Point, curve
from rlfusion.jobs.compare.report import Outcome, Terms, report
from rlfusion.jobs.measure import Scored
from rlfusion.jobs.parts import opened
from rlfusion.jobs.pretrain import base_model
from rlfusion.rewards import CallOptions
from rlfusion.training import checkpoint, identity
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.folders import discard
from rlfusion.training.tracking import flatten, overlay


def check(config: Compare) -> list[str]:
    """Refuse what cannot work; an agent that cannot serve a reward is no error but a cell of the table that says so.

    Returns:
        Those cells.

    Raises:
        ConfigError: nothing of the comparison can run, or a setting is wrong for every run.
    """
    errors: list[tuple[str, str, ConfigError]] = []
    runs = list(config.runs())
    for agent, reward, seed, settings in runs:
        try:
            finetune.check(settings)
        except ConfigError as error:
            errors.append((reward, f"{agent} on {reward}, seed {seed}: {error}", error))
    if len(errors) == len(runs):
        raise errors[0][2]
    for name in config.rewards:
        told = [settings for _, reward, _, settings in runs if reward == name]
        if len(told) == sum(reward == name for reward, *_ in errors):  # is it the reward? The baselines need it, too
            finetune.require_reward(told[0])
    return [message for _, message, _ in errors]


def compare(config: Compare, folder: Path, signals: Signals, progress: Progress) -> str:
    """The whole job in ``folder``; what is there already is not done again. Returns the table.

    Raises:
        ConfigError: no base model can be made.
        StopRequested: a signal came; all work is saved.
    """
    set_numerics(config.threads, pick_device(config.device), config.deterministic, config.tf32)
    for note in identity.enter(folder, "compare", config).notes:
        progress.say(note)
    for agent in config.unmasked():
        progress.say(f"{agent} scores as it learns, sample by sample: for it a reward that fails is an error")
    base = _base(config, signals, progress)
    outcomes, places = [], {}
    for agent, reward, seed, settings in config.runs():
        place = places[agent, reward, seed] = folder / slug(f"{agent}-{reward}-seed{seed}")
        progress.say(f"{agent} on {reward}, seed {seed}")
        outcomes.append(Outcome(agent, reward, seed, *_run(settings, base, place, config.root, signals, progress)))
    measured = _baselines(config, base, signals, progress)
    for outcome in outcomes:
        _overlay(places[outcome.agent, outcome.reward, outcome.seed], outcome)
    checkpoint.write_json_atomic(folder / "baselines.json", measured)
    return report(terms(config, folder), folder, outcomes, measured, places)


def terms(config: Compare, folder: Path) -> Terms:
    """How the report tells of a comparison."""
    unmasked = config.unmasked()
    agents = list(map(shown, config.agents))
    differing = {text: flatten(asdict(config.agent(whole))) for text, whole in zip(agents, config.agents)}
    return Terms(
        budget=f"{config.budget_queries} queries a run, {config.seeds} seed(s), one base model",
        agents=agents,
        rewards=config.rewards,
        target=config.target,
        quality=config.quality,
        note=f" A reward that fails is left out, but an error for {', '.join(unmasked)}." if unmasked else "",
        command=f"rlfusion compare --config {shlex.quote(str(folder / 'config.yaml'))}",
        differing={text: {name: str(value) for name, value in held.items()} for text, held in differing.items()},
    )


def slug(text: str) -> str:
    """A text as the name of a folder."""
    return "".join(c if c.isalnum() or c in "._" else "-" for c in text).strip("-")


def _base(config: Compare, signals: Signals, progress: Progress) -> Path | str:
    """The base model of all runs: a model's folder, or what names a pretrained pipeline."""
    if config.base:
        one = next(config.runs())[3]
        return (
            config.base
            if origin.pretrained(opened(_with(one, root=config.root)).base)
            else models.find(Path(config.base))
        )
    return base_model(config.pretrain, Path(config.root), pick_device(config.device), signals, progress)


def _run(
    settings: Finetune, base: Path | str, folder: Path, root: str, signals: Signals, progress: Progress
) -> tuple[list[Point], str]:
    """The curve of one run, and why it has none or ends before its time."""
    settings = _with(settings, root=root, name=folder.name, base=str(base))
    try:
        finetune.check(settings)
    except ConfigError as error:
        return [], f"refused: {error}"
    _make_room(settings, folder, progress)
    storage.write(folder / "config.yaml", to_yaml(settings))
    try:
        finetune.finetune(settings, folder, signals, progress)
    except ConfigError as error:
        discard(folder)
        return [], f"refused: {error}"
    except NumericalError as error:
        return _so_far(folder), f"failed: {error}"
    return curve(folder), ""


def _make_room(settings: Finetune, folder: Path, progress: Progress) -> None:
    """A folder for a run; one of other settings, which the comparison had before a change, is set aside.

    Raises:
        ConfigError: nothing says which run is in it.
    """
    try:
        storage.make_folder(folder)
        identity.enter(folder, "finetune", settings)
    except identity.DiffersError as error:
        progress.say(f"{error}: set aside as {checkpoint.set_aside(folder, 'before').name}, and run again")
        storage.make_folder(folder)


def _so_far(folder: Path) -> list[Point]:
    """The evaluations of a run that failed, none where it failed before the first."""
    return curve(folder) if (folder / "before.json").is_file() and (folder / "timing.jsonl").is_file() else []


def _with(settings: Finetune, **changes: Any) -> Finetune:
    return Finetune(**vars(settings) | changes)


def _baselines(
    config: Compare, base: Path | str, signals: Signals, progress: Progress
) -> dict[str, dict[str, Measured | str]]:
    """What each reward says of the baselines, by reward and name."""
    device, root = pick_device(config.device), Path(config.root)
    one = _with(next(config.runs())[3], root=config.root, base=str(base))
    begun = origin.begin(opened(one).base, device, signals, progress)
    denoiser, judged = begun.denoiser, begun.judged
    found, call_options = {}, CallOptions(config.reward_timeout_s, config.reward_cache)
    may_fail = config.max_failed if config.reward_failures == "mask" else None
    tries = Tries(config.evaluation.samples, config.best_of, config.guidance)
    for name in config.rewards:
        reward = judged.reward(name, _options(config, name), root, call_options)
        if isinstance(reward, torch.nn.Module):
            reward.to(device)
        found[name] = dict(baselines(denoiser, config.chain, judged, Scored(reward, "reward", may_fail), tries))
    return found


def _options(config: Compare, name: str) -> dict[str, dict[str, Any]]:
    return {name: config.reward_options[name]} if name in config.reward_options else {}


def _overlay(folder: Path, outcome: Outcome) -> None:
    """The run's curves for TensorBoard, whose horizontal axes are whole numbers."""
    if not outcome.points:
        return
    group = f"compare_{slug(outcome.reward)}"
    axes = {
        "gain_by_queries": [(p.queries, p.gain) for p in outcome.points],
        "gain_by_cpu_milliseconds": [(round(1000 * p.cpu_seconds), p.gain) for p in outcome.points],
        "diversity_by_queries": [(p.queries, p.diversity) for p in outcome.points],
    }
    if outcome.points[0].frechet is not None:
        axes |= {
            "gain_by_frechet_x100": [(round(100 * p.frechet), p.gain) for p in outcome.points],
            "frechet_by_queries": [(p.queries, p.frechet) for p in outcome.points],
            "agreement_by_queries": [(p.queries, p.agreement) for p in outcome.points],
        }
    drawn, marker = sha256(json.dumps(axes).encode()), folder / ".overlaid"
    if marker.is_file() and marker.read_text() == drawn:
        return
    overlay(folder, {f"{group}/{name}": points for name, points in axes.items()})
    storage.write(marker, drawn)
