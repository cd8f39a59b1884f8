"""The job of ``rlfusion push``: a folder with a run's model, its card, samples and curves; and its upload."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import yaml

from rlfusion import __version__
from rlfusion.common import hub, storage
from rlfusion.common.errors import ConfigError, UnavailableError
from rlfusion.config.push import Push
from rlfusion.jobs import stored_runs
from rlfusion.jobs.curves import Point, curve
from rlfusion.jobs.measure import headlines
from rlfusion.jobs.stored_runs import Stored
from rlfusion.models.seal import require_seal, sealed
from rlfusion.training.checkpoint import write_json_atomic

UNKNOWN = "unknown"
PATHLIKE = re.compile(r"(?<![\w:/.])[~.]{0,2}/(?:[^\s/:'\",()]+/)*([^\s/:'\",()]+)")
"""A path in a setting: its last name alone is told to others."""
PICTURES = ("before", "after")
WRITTEN = "pushed.json"
"""What pushes have written, in the run's folder."""


@dataclass(frozen=True)
class Told:
    """What the card says.

    Attributes:
        run: it.
        base: the hub's name of the base model, or a word for it.
        hub_base: whether ``base`` is such a name.
        license: of the model.
        pipeline: how diffusers loads it: "lora", "whole", or "" of a model of our own.
        summary: summary.json; {} of a run that is not finished.
        points: its curve.
        prompts: of a pipeline, some of them.
    """

    run: Stored
    base: str
    hub_base: bool
    license: str
    pipeline: str
    summary: dict[str, Any]
    points: list[Point]
    prompts: tuple[str, ...]


def push(settings: Push, say: Callable[[str], None]) -> Path:
    """Write the folder and, unless it is a dry run, upload it; the folder.

    Raises:
        ConfigError: no such model, a damaged one, or a folder that is not empty and not of an earlier push.
        UnavailableError: the hub refuses, or is not there.
    """
    run = stored_runs.one(settings.run)
    model = run.folder / settings.which
    if run.command != "finetune" or not (model / "model.json").is_file():
        what = f"of {run.command}" if run.command != "finetune" else f"without {settings.which}/"
        raise ConfigError(f"{settings.run!r} is a run {what}: expected a run of finetune with a model")
    api = None if settings.dry_run else _api()
    about = json.loads((model / "model.json").read_text())
    require_seal(about, model / "model.json")
    told = _told(settings, run, model, about, api)
    folder = Path(settings.out) if settings.out else run.folder / "hub"
    _make_room(run.folder, folder)
    _write(folder, model, about, told, settings.to)
    _note(run.folder, folder, say)
    say(f"{folder}: README.md, {', '.join(sorted(f.name for f in folder.iterdir() if f.name != 'README.md'))}")
    if api is not None:
        say(f"uploaded: {_upload(api, settings, folder)}")
    return folder


def _make_room(run: Path, folder: Path) -> None:
    """Remove what an earlier push of the run wrote, a dry one or one that the hub refused, where nothing changed it.

    Raises:
        ConfigError: the folder is of something else, or was changed.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    made = _written(run).get(str(folder.resolve()))
    if folder.is_symlink() or not folder.is_dir() or made != _files(folder):
        changed = "is not as push wrote it" if made else "was not written by a push of this run"
        raise ConfigError(f"out = {str(folder)!r} is there already, and {changed}: remove it, or say another --out")
    with storage.stored(folder):
        shutil.rmtree(folder)


def _note(run: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Keep in the run's folder what was written; one that cannot be written to is pushed all the same."""
    try:
        write_json_atomic(run / WRITTEN, _written(run) | {str(folder.resolve()): _files(folder)})
    except OSError as error:
        say(f"{run / WRITTEN} cannot be written ({error}): another push will not write {folder} anew")


def _written(run: Path) -> dict[str, Any]:
    """The folders that pushes of a run have written, with the size and the time of each file."""
    try:
        held = json.loads((run / WRITTEN).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _files(folder: Path) -> dict[str, list[int]]:
    """What lies in a folder: each file, or link, with its size and time, and each folder in it."""
    return {str(one.relative_to(folder)): _dated(one) for one in sorted(folder.rglob("*"))}


def _dated(one: Path) -> list[int]:
    about = one.lstat()
    return [about.st_size, about.st_mtime_ns] if one.is_symlink() or not one.is_dir() else []


def _told(settings: Push, run: Stored, model: Path, about: Mapping[str, Any], api: Any) -> Told:
    pipeline = about.get("pipeline") or {}
    base = str(run.settings.get("base") or "")
    hub_base = bool(pipeline) and not Path(base).exists() and base.count("/") == 1
    summary = run.folder / "summary.json"
    measured = (run.folder / "before.json").is_file() and (run.folder / "timing.jsonl").is_file()
    return Told(
        run,
        base
        if hub_base
        else Path(base).name or f"a model pretrained on {_shown(run.settings.get('pretrain.data', ''))}",
        hub_base,
        settings.license or _license(base, hub_base, api),
        ("lora" if any(model.glob("*lora*.safetensors")) else "whole") if pipeline else "",
        json.loads(summary.read_text()) if summary.is_file() else {},
        curve(run.folder) if measured else [],
        tuple(about.get("names", ()))[:20] if pipeline else (),
    )


def _license(base: str, hub_base: bool, api: Any) -> str:
    """What the base says of its licence: the card in its folder, or that of the hub; "unknown" where neither does.

    Raises:
        UnavailableError: the hub is not there.
    """
    card = Path(base) / "README.md"
    if base and card.is_file():
        return _of_card(card.read_text(errors="replace"))
    if not hub_base or api is None:
        return UNKNOWN
    try:
        data = api.model_info(base).card_data
        return str((data or {}).get("license") or UNKNOWN)
    except (OSError, ValueError):  # a base that the hub does not know, or does not show us
        return UNKNOWN
    except Exception as error:  # of the network below the hub's client
        raise UnavailableError(f"the licence of {base}: {hub.failed(error)}; expected the hub, or --license") from error


def _of_card(text: str) -> str:
    """The licence in the first lines of a model card."""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    try:
        held = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return UNKNOWN
    found = held.get("license") if isinstance(held, dict) else None
    return found if isinstance(found, str) and found else UNKNOWN


def _write(folder: Path, model: Path, about: dict[str, Any], told: Told, repo: str) -> None:
    storage.make_folder(folder)
    with storage.stored(folder):
        shutil.copytree(model, folder, dirs_exist_ok=True)
    storage.write(folder / "model.json", sealed(_without_places(about)))
    for name in PICTURES:
        if (picture := told.run.folder / "samples" / f"{name}.png").is_file():
            storage.write(folder / f"{name}.png", picture.read_bytes())
    if len(told.points) > 1:
        storage.write(folder / "curve.png", _drawn(told.points))
    storage.write(folder / "README.md", card(told, repo, folder))


def _without_places(about: dict[str, Any]) -> dict[str, Any]:
    """A description without where things lie on this machine."""
    held = {name: value for name, value in about.items() if name not in ("seal", "data")}
    if pipeline := held.get("pipeline"):
        name = str(pipeline.get("name", ""))
        held["pipeline"] = {**pipeline, "cache": "", "name": Path(name).name if Path(name).is_absolute() else name}
    return held


def _shown(value: Any) -> str:
    """A setting as it is told to others: of a path its last name alone."""
    return PATHLIKE.sub(r"\1", str(value)).replace("|", "\\|").replace("\n", " ")


def _drawn(points: list[Point]) -> bytes:
    """The gain over queries, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([p.queries for p in points], [p.gain for p in points], marker="o")
    axes.set(xlabel="queries", ylabel="gain (sd of the base's rewards)")
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=100)
    return drawn.getvalue()


def card(told: Told, repo: str, folder: Path) -> str:
    """The model card."""
    run = told.run
    head: dict[str, Any] = {"license": told.license, "library_name": "diffusers" if told.pipeline else "rlfusion"}
    head |= {"base_model": told.base} if told.hub_base else {}
    head |= {"pipeline_tag": "text-to-image"} if told.pipeline else {}
    head |= {"tags": ["reinforcement-learning", "reward-fine-tuning", run.agent]}
    head["tags"] += ["lora"] if told.pipeline == "lora" else []
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n",
        f"# {repo.partition('/')[2]}\n",
        f"{told.base}, fine-tuned by {run.agent} for the reward {_shown(run.reward)} with rlfusion {__version__} "
        f"(seed {run.settings.get('seed')}). A reward is no measure of quality: look at the samples.\n",
        _licensed(told),
        f"## Use\n\n```{'python' if told.pipeline else 'bash'}\n{_use(told, repo)}\n```\n",
        _result(told),
        "## Gain over queries\n\n![gain](curve.png)\n" if (folder / "curve.png").is_file() else "",
        _samples(told, folder),
        _settings(told),
    ]
    return "\n".join(filter(None, parts))


def _licensed(told: Told) -> str:
    if told.license == UNKNOWN:
        return "Its licence is unknown: that of the base holds, and was not found.\n"
    return f"Licence: {told.license}.\n"


def _use(told: Told, repo: str) -> str:
    if not told.pipeline:
        return f"hf download {repo} --local-dir model\nrlfusion sample --checkpoint model"
    if told.pipeline == "whole":
        return f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{repo}")'
    base = told.base if told.hub_base else "BASE"
    lines = ("from diffusers import DiffusionPipeline", "", f'pipe = DiffusionPipeline.from_pretrained("{base}")')
    return "\n".join((*lines, f'pipe.load_lora_weights("{repo}")'))


def _result(told: Told) -> str:
    before, after = told.summary.get("before"), told.summary.get("after")
    if not before or not after:
        return "## Result\n\nThe run was not finished.\n"
    rows = [f"| {name} | {before[name]:.4g} | {after[name]:.4g} |" for name in headlines(after) if name in before]
    spent = f"{told.summary.get('queries')} rewards asked for in {told.summary.get('updates')} updates"
    return "## Result\n\n| | before | after |\n|---|---|---|\n" + "\n".join(rows) + f"\n\n{spent}.\n"


def _samples(told: Told, folder: Path) -> str:
    there = [name for name in PICTURES if (folder / f"{name}.png").is_file()]
    lines = [f"![{name}]({name}.png)" for name in there]
    said = [f"- {' '.join(prompt.split())}" for prompt in told.prompts]
    head = f"## Samples on the same seeds: {', '.join(there)}\n" if there else ""
    return "\n".join(filter(None, (head, "\n\n".join(lines), "\nPrompts:\n" if said else "", *said))) + "\n"


def _settings(told: Told) -> str:
    kept = ("agent.", "chain.", "rollout.", "reward", "lora", "updates", "budget_queries", "seed", "pipeline.size")
    rows = [f"| {k} | {_shown(v)} |" for k, v in told.run.settings.items() if k.startswith(kept)]
    return "## Settings\n\n| setting | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def _api() -> Any:
    """The hub's client.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ConfigError("push needs huggingface_hub: pip install huggingface_hub, or --dry_run true") from error
    return HfApi()


def _upload(api: Any, settings: Push, folder: Path) -> str:
    """Make the repository where it is not there, and upload the folder; where it is.

    Raises:
        UnavailableError: the hub refuses, or is not there.
    """
    try:
        api.create_repo(repo_id=settings.to, repo_type="model", private=settings.private, exist_ok=True)
        told = f"{settings.which} of a run by rlfusion {__version__}"
        return str(
            api.upload_folder(repo_id=settings.to, repo_type="model", folder_path=str(folder), commit_message=told)
        )
    except Exception as error:  # dozens of errors of the hub's client, and of the network below it
        raise UnavailableError(
            f"to = {settings.to}: {hub.failed(error)}; {folder} is written: expected an account that may write there "
            "(hf auth login), then: hf upload " + f"{settings.to} {folder}"
        ) from error
