"""The job of ``rlfusion compare``: the runs one after another, each resumable, then the report."""

import json
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlfusion import models
from rlfusion.common import storage
from rlfusion.common.errors import ConfigError
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.common.weights import sha256
from rlfusion.config import Finetune
from rlfusion.config.compare import Compare
from rlfusion.jobs import base_model as origin
from rlfusion.jobs import finetune
from rlfusion.jobs.compare import beside, placed
from rlfusion.jobs.compare.baselines import Tries, baselines
from rlfusion.jobs.compare.members import members, place_of, slug, with_settings
from rlfusion.jobs.compare.report import DATA, Outcome, Terms, Untrained, report
from rlfusion.jobs.finetune import about
from rlfusion.jobs.measure import Scored
from rlfusion.jobs.parts import opened
from rlfusion.jobs.pretrain import base_model
from rlfusion.rewards import CallOptions
from rlfusion.training import checkpoint, identity
from rlfusion.training.devices import pick_device, set_numerics
from rlfusion.training.tracking import flatten, overlay

SHORT_S = 100.0
"""CPU seconds up to which whole ones are too coarse for a curve."""


def check(config: Compare) -> list[str]:
    """Refuse what cannot work; an agent that cannot serve a reward is no error but a cell of the table that says so.

    Returns:
        Those cells.

    Raises:
        ConfigError: nothing of the comparison can run, a setting is wrong for every run, a varied value cannot work
            where another can, or two runs would have one folder.
    """
    errors: list[tuple[str, str, ConfigError]] = []
    runs = list(config.runs())
    _require_folders(runs)
    failed: dict[tuple[str, str], ConfigError] = {}
    for agent, reward, seed, settings in runs:
        try:
            finetune.check(settings)
        except ConfigError as error:
            errors.append((reward, f"{agent} on {reward}, seed {seed}: {error}", error))
            failed[agent, reward] = error
    if len(errors) == len(runs):
        raise errors[0][2]
    _require_values(config, failed)
    for name in config.rewards:
        told = [settings for _, reward, _, settings in runs if reward == name]
        if len(told) == sum(reward == name for reward, *_ in errors):  # is it the reward? The baselines need it, too
            finetune.require_reward(told[0])
    return [message for _, message, _ in errors]


def _require_folders(runs: list[tuple[str, str, int, Finetune]]) -> None:
    """Refuse two runs of one folder, whose names differ in signs that no folder's name has."""
    seen: dict[str, str] = {}
    for agent, reward, seed, _ in runs:
        told, place = f"{agent!r} on {reward!r}", place_of(agent, reward, seed)
        if seen.setdefault(place, told) != told:
            raise ConfigError(f"{seen[place]} and {told} would both be in {place!r}: expected names that differ more")


def _require_values(config: Compare, failed: Mapping[tuple[str, str], ConfigError]) -> None:
    """Refuse a varied value that cannot work where another of the same agent and reward can."""
    rows = config.rows()
    for row in rows:
        alike = [other.name for other in rows if other.agent == row.agent]
        for reward in config.rewards:
            error = failed.get((row.name, reward))
            if error is not None and any((name, reward) not in failed for name in alike):
                raise ConfigError(f"vary: {row.name} on {reward} cannot run: {error}") from error


def compare(config: Compare, folder: Path, signals: Signals, progress: Progress) -> str:
    """The whole job in ``folder``; what is there already is not done again. Returns the table.

    Raises:
        ConfigError: no base model can be made.
        StopRequested: a signal came; all work is saved.
        UnavailableError, UserCodeError: of runs side by side some died; the others are in the report.
    """
    set_numerics(config.threads, pick_device(config.device), config.deterministic, config.tf32)
    run = identity.enter(folder, "compare", config)
    for note in run.notes:
        progress.say(note)
    for agent in config.unmasked():
        progress.say(f"{agent} scores as it learns, sample by sample: for it a reward that fails is an error")
    base = _base(config, signals, progress)
    runs = list(members(config, base, folder))
    checkpoint.write_json_atomic(folder / about.FILE, about.shared(about.columns(member.settings) for member in runs))
    if not all(member.done for member in runs):
        run.reopen()
    if config.side_by_side == 1 and not config.ray.address:
        for member in runs:
            progress.say(str(member))
            if member.ready(progress):
                member.run(signals, progress)
        measured = _baselines(config, base, signals, progress)
    else:
        measured = _baselines(config, base, signals, progress)  # what runs share in the cache is made before them
        with placed.nodes(config, progress.say) if config.ray.address else nullcontext(beside.Process.start) as begin:
            beside.run(runs, beside.room(config), folder / beside.LOGS, signals, progress, config.run_restarts, begin)
    outcomes = [member.outcome() for member in runs]
    places = {(member.agent, member.reward, member.seed): member.folder for member in runs}
    longest = max((p.cpu_seconds for outcome in outcomes for p in outcome.points), default=0.0)
    for outcome in outcomes:
        _overlay(places[outcome.agent, outcome.reward, outcome.seed], outcome, longest < SHORT_S)
    checkpoint.write_json_atomic(folder / "baselines.json", {name: one.measured for name, one in measured.items()})
    page = report(terms(config, folder), folder, outcomes, measured, places)
    beside.require_ended(runs, folder)
    run.finish(DATA)
    return page


def terms(config: Compare, folder: Path) -> Terms:
    """How the report tells of a comparison."""
    unmasked = config.unmasked()
    rows = config.rows()
    differing = {row.name: {**flatten(asdict(config.agent(row.agent))), **_by_name(row.varied)} for row in rows}
    return Terms(
        budget=f"at most {config.budget_queries:,} queries a run, {config.seeds} seed(s), one base model",
        agents=[row.name for row in rows],
        rewards=config.rewards,
        target=config.target,
        quality=config.quality,
        note=f" A reward that fails is left out, but an error for {', '.join(unmasked)}." if unmasked else "",
        command=f"rlfusion compare --config {shlex.quote(str(folder / 'config.yaml'))}",
        differing={text: {name: str(value) for name, value in held.items()} for text, held in differing.items()},
    )


def _by_name(varied: dict[str, Any]) -> dict[str, Any]:
    """Varied settings, those of the agent as it calls them."""
    return {name.removeprefix("agent."): value for name, value in varied.items()}


def _base(config: Compare, signals: Signals, progress: Progress) -> Path | str:
    """The base model of all runs: a model's folder, or what names a pretrained pipeline."""
    if config.base:
        one = next(config.runs())[3]
        return (
            config.base
            if origin.pretrained(opened(with_settings(one, root=config.root)).base)
            else models.find(Path(config.base))
        )
    return base_model(config.pretrain, Path(config.root), pick_device(config.device), signals, progress)


def _baselines(config: Compare, base: Path | str, signals: Signals, progress: Progress) -> dict[str, Untrained]:
    """What each reward says of the baselines."""
    device, root = pick_device(config.device), Path(config.root)
    one = with_settings(next(config.runs())[3], root=config.root, base=str(base))
    begun = origin.begin(opened(one).base, device, signals, progress)
    denoiser, judged = begun.denoiser, begun.judged
    found, call_options = {}, CallOptions(config.reward_timeout_s, config.reward_cache)
    may_fail = config.max_failed if config.reward_failures == "mask" else None
    tries = Tries(config.evaluation.samples, config.best_of, config.guidance)
    for name in config.rewards:
        reward = judged.reward(name, _options(config, name), root, call_options)
        if isinstance(reward, torch.nn.Module):
            reward.to(device)
        held: dict[str, np.ndarray] = {}
        keep = partial(_keep, held)
        scored = Scored(reward, "reward", may_fail)
        found[name] = Untrained(dict(baselines(denoiser, config.chain, judged, scored, tries, keep)), held)
    return found


def _keep(held: dict[str, np.ndarray], name: str, label: Tensor, reward: Tensor) -> None:
    held[name] = torch.stack([label.double(), reward.double()]).cpu().numpy()


def _options(config: Compare, name: str) -> dict[str, dict[str, Any]]:
    return {name: config.reward_options[name]} if name in config.reward_options else {}


def _overlay(folder: Path, outcome: Outcome, fine: bool) -> None:
    """The run's curves for TensorBoard, whose horizontal axes are whole numbers: of seconds, or, if ``fine``, of
    hundredths.
    """
    if not outcome.points:
        return
    group = f"compare_{slug(outcome.reward)}"
    unit, parts = ("hundredths of a CPU second", 100) if fine else ("CPU seconds", 1)
    axes = {
        "gain by queries": [(p.queries, p.gain) for p in outcome.points],
        f"gain by {unit}": [(round(p.cpu_seconds * parts), p.gain) for p in outcome.points],
        "diversity by queries": [(p.queries, p.diversity) for p in outcome.points],
    }
    if outcome.points[0].frechet is not None:
        judged = [p for p in outcome.points if p.frechet is not None]
        axes |= {
            "gain by Frechet distance x 100": [(round(100 * p.frechet), p.gain) for p in judged],
            "Frechet distance by queries": [(p.queries, p.frechet) for p in judged],
            "agreement by queries": [(p.queries, p.agreement) for p in outcome.points],
        }
    drawn, marker = sha256(json.dumps(axes).encode()), folder / ".overlaid"
    if marker.is_file() and marker.read_text() == drawn:
        return
    overlay(folder, {f"{group}/{name}": points for name, points in axes.items()})
    storage.write(marker, drawn)
