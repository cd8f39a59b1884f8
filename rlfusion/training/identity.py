"""Which run a folder is: ``run.json``, written when it begins and compared whenever it goes on.

    run        drawn once; each checkpoint's manifest has it, so that no other run's is taken for one of this
    settings   all of them, as they were when work was last done, by dotted name
    config     the same as a file of settings has them: a name may have dots of its own, as a reward's has
    digests    SHA-256 of those that decide the bits of the result, the present ones last; manifests have one of them
    changes    what ``--change`` has changed since: {"after": updates done, "settings": {name: [old, new]}}, and
               "content", the settings that name other content as they are
    inputs     SHA-256 of what settings name and the run learns from (its data, the model it begins with)
    saved      whether a checkpoint was ever written, so that their loss is noticed
    sealed     SHA-256 of the result, by file, once the run is finished
    sha256     of all this

A setting decides bits unless ``FREE`` has it. Where ``run.json`` is lost it is made again from the newest checkpoint,
if that was saved under the settings of ``config.yaml``.
"""

import json
import os
import secrets
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rlfusion.common.annotations import shown
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import read_file, sha256
from rlfusion.training import checkpoint
from rlfusion.training.checkpoint import MALFORMED, CheckpointError, Found, Keep, Owner, Writer, write_json_atomic
from rlfusion.training.deciding import (
    ABSENT,
    FILES,
    FURTHER,
    added,
    decisive,
    differences,
    digest,
    flat,
    plain,
    sha256_of,
)

FORMAT = 1
KEEP = Keep()
NONE: Mapping[str, float] = {}
FILE = "run.json"
KINDS = {"command": str, "run": str, "config": dict, "settings": dict, "digests": list, "changes": list, "saved": bool}
"""What the entries of ``run.json`` are."""

LENGTH = {"finetune": "updates", "pretrain": "train.steps", "pretrain-autoencoder": "steps", "train-clip": "steps"}
"""The setting that says how many updates a run of a command has, where one does."""

MODEL = ("model/model.json", "model/weights.safetensors")
"""What of a finished run's model is compared; of a pipeline, model.json has the SHA-256 of its files."""

CONTENT = ("data", "size", "base", "teacher", "autoencoder")
"""Settings on which the content of ``inputs`` depends, but for that of ``REWARD``."""
REWARD = "reward"

PLACE = ("root", "name")
EDITED = "edited"
"""What ``--change files=`` says: the files of the user's own code are meant as they are now."""
SAID = 3


class DiffersError(ConfigError):
    """The settings are not those of the run."""


@dataclass(frozen=True)
class Record:
    """What ``run.json`` holds."""

    command: str
    run: str
    config: dict[str, Any]
    settings: dict[str, Any]
    digests: tuple[str, ...]
    changes: tuple[dict[str, Any], ...] = ()
    saved: bool = False
    sealed: dict[str, str] | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put it into ``folder``."""
        held = {"format": FORMAT, **asdict(self)}
        write_json_atomic(folder / FILE, {**held, "sha256": sha256_of(held)})

    def since(self, found: Found) -> dict[str, tuple[Any, Any]]:
        """{name: (old value, new value)} of what decides bits and has changed since a checkpoint of the run was saved:
        the two are equal where a setting names other content.
        """
        then = dict(self.settings)
        named: dict[str, tuple[Any, Any]] = {}
        before: dict[str, Any] = {}
        for one in reversed(self.changes):
            if one["after"] >= found.step:
                named |= {name: (self.settings.get(name), self.settings.get(name)) for name in one.get("content", ())}
            if digest(then) != found.settings:
                then |= {name: old for name, (old, _) in one["settings"].items()}
                then = {name: value for name, value in then.items() if value != ABSENT}
                before |= {name: one["settings"][name][1] for name in one.get("added", ())}
        return named | differences(decisive(before | then), decisive(self.settings))

    def changed_after(self, *names: str) -> int:
        """The updates that were done when one of these settings was last changed; 0 for never."""
        changed = ((one["after"], one["settings"].keys() - one.get("added", ())) for one in self.changes)
        return max((after for after, which in changed if not which.isdisjoint(names)), default=0)

    @classmethod
    def read(cls, folder: Path) -> "Record":
        """That of ``folder``.

        Raises:
            ConfigError: it is damaged.
            FileNotFoundError: it is not there.
        """
        file = folder / FILE
        try:
            held = json.loads(read_file(file))
            stated = held.pop("sha256")
            if held.pop("format") != FORMAT or sha256_of({"format": FORMAT, **held}) != stated:
                raise ValueError("it does not match its own SHA-256")
            for name, kind in KINDS.items():
                if not isinstance(held[name], kind):
                    raise ValueError(f"{name!r} is {type(held[name]).__name__}")
            tuples = {name: tuple(held[name]) for name in ("digests", "changes")}
            return cls(**held | tuples | {"sealed": held["sealed"] if isinstance(held["sealed"], dict) else None})
        except FileNotFoundError:
            raise
        except MALFORMED as error:
            raise ConfigError(f"{str(file)!r} is damaged: {type(error).__name__}: {error}") from error


def intact(folder: Path, record: Record, name: str) -> bool:
    """Whether a run is finished, with the file ``name``, and all that it made is as it was written."""
    made = record.sealed or {}
    return name in made and all(
        (folder / made_name).is_file() and sha256((folder / made_name).read_bytes()) == digest
        for made_name, digest in made.items()
    )


def made(folder: Path, settings: Any, name: str) -> bool:
    """Whether ``folder`` holds a finished run of these settings, with the file ``name``, all as it was written. It may
    be of a version of rlfusion without some of them (``deciding.added``).
    """
    try:
        record = Record.read(folder)
    except (ConfigError, FileNotFoundError):
        return False
    new = added(record.settings, settings)
    known = {key: value for key, value in flat(settings).items() if key not in new}
    return record.digests[-1] == digest(known) and intact(folder, record, name)


class Run:
    """A run at work in its folder, which this process holds; ``notes`` are to be told, checkpoints stay by ``keep``."""

    def __init__(self, folder: Path, record: Record, notes: tuple[str, ...] = (), keep: Keep = KEEP) -> None:
        self.folder, self.record, self.notes = folder, record, notes
        self.writer = Writer(self.checkpoints, keep)

    @property
    def owner(self) -> Owner:
        """Whose its checkpoints are."""
        return Owner(self.record.run, self.record.digests)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    def require_inputs(self, inputs: Mapping[str, str]) -> None:
        """Write down the SHA-256 of what settings name, by setting, when the run begins; afterwards it is the same.

        Raises:
            ConfigError: it is not.
        """
        for name, now in inputs.items():
            if (was := self.record.inputs.get(name, now)) != now:
                raise ConfigError(
                    f"{self.folder} was begun with other content of {name} (SHA-256 {now[:12]}, was {was[:12]}): "
                    f"put that back, say --change {name}=... where the new one is meant, or begin again"
                )
        if self.record.inputs != (held := {**self.record.inputs, **inputs}):
            self._write(inputs=held)

    def newest(self, total: int) -> Found | None:
        """The newest checkpoint that is whole and its own, up to step ``total``; None where none was ever saved.

        Raises:
            CheckpointError: there were checkpoints, and none is left.
            ConfigError: it has done more than ``total``.
        """
        found = checkpoint.latest(self.checkpoints, self.owner)
        if found is None and self.record.saved:
            held = sorted(path.name for path in self.checkpoints.glob("*")) if self.checkpoints.is_dir() else []
            raise CheckpointError(
                f"{self.folder} has lost its checkpoints: {self.checkpoints} holds {', '.join(held[:5]) or 'nothing'}; "
                "put one back, or keep config.yaml, remove the folder, and begin again with --config"
            )
        if found is not None:
            self._mark()
            if found.step > total:
                raise ConfigError(too_short(self.folder, found.step, total))
        return found

    def save(self, step: int, state: dict[str, Any], metrics: Mapping[str, float] = NONE) -> None:
        """Save ``state`` as its checkpoint of ``step``, as ``checkpoint.save`` does."""
        with self.writing() as begin:
            begin(step, state, metrics)

    @contextmanager
    def writing(self) -> Iterator[Callable[[int, dict[str, Any], Mapping[str, float]], None]]:
        """Within the context checkpoints are written, by what it gives: ``begin(step, state, metrics)``.

        Raises:
            StorageError, CheckpointError: one was not written: at the next, or at the end.
        """
        with self.writer.open() as writer:

            def begin(step: int, state: dict[str, Any], metrics: Mapping[str, float]) -> None:
                writer.begin(step, state, self.owner, metrics, self._mark)

            yield begin

    def _mark(self) -> None:
        if not self.record.saved:
            self._write(saved=True)

    def seal(self, name: str, result: dict[str, Any]) -> None:
        """Write the result into the file of that name: the run is finished."""
        write_json_atomic(self.folder / name, result)
        self.finish(name, *MODEL)

    def finish(self, *names: str) -> None:
        """The run is finished, and these files, where they are, are what it made."""
        made = {name: sha256(file.read_bytes()) for name in names if (file := self.folder / name).is_file()}
        self._write(sealed=made)

    def reopen(self) -> None:
        """Something of a finished run is to be done again."""
        if self.record.sealed is not None:
            self._write(sealed=None)

    def result(self, name: str) -> dict[str, Any] | None:
        """The result of a finished run; None where it is not finished, or its files not what was written."""
        if not intact(self.folder, self.record, name):
            return None
        return json.loads((self.folder / name).read_text())

    def _write(self, **changes: Any) -> None:
        self.record = replace(self.record, **changes)
        self.record.write(self.folder)


def enter(folder: Path, command: str, settings: Any, keep: Keep = KEEP) -> Run:
    """The run of ``command`` in ``folder``, new or to go on with ``settings``; its checkpoints stay by ``keep``. Where
    settings that a later version added have their defaults, it is the same run, and that is written down.

    Raises:
        DiffersError: a setting that decides bits is not what it was; it is named with both values.
        ConfigError: it is another command's, or nothing says which run it is.
    """
    now, notes = flat(settings), []
    try:
        record = Record.read(folder)
    except (ConfigError, FileNotFoundError) as error:
        record = _again(folder, command, settings, error)
        if isinstance(error, ConfigError):
            notes.append(f"{error}; set aside as {checkpoint.set_aside(folder / FILE, 'corrupt').name}")
        if record.saved:
            notes.append(f"{folder / FILE} is made again from the newest checkpoint")
        record.write(folder)
    require_command(folder, record, command)
    new = added(record.settings, settings)
    changed = differences(decisive(record.settings), decisive(now))
    if changed := {name: pair for name, pair in changed.items() if name not in new}:
        raise DiffersError(differs(folder, changed))
    if decisive(new):
        record = _with(folder, record, new)
        record.write(folder)
    if moved := differences(record.settings, now):
        told = {name: pair for name, pair in moved.items() if name not in PLACE}
        notes += [f"{name} was {shown(old)}, is {shown(new)}" for name, (old, new) in told.items()]
        sealed = record.sealed if moved.keys().isdisjoint(FURTHER) else None
        record = replace(record, config=plain(settings), settings=now, sealed=sealed)
        record.write(folder)
    return Run(folder, record, tuple(notes), keep)


def _with(folder: Path, record: Record, new: Mapping[str, Any]) -> Record:
    """The record of a run that goes on under a version which has these settings more, by their defaults."""
    held = {**record.settings, **new}
    one = {"after": done(folder), "settings": {name: [ABSENT, new[name]] for name in new}, "added": list(new)}
    return replace(record, settings=held, digests=_then(record, held), changes=(*record.changes, one))


def _then(record: Record, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The digests of a run that goes on with these settings."""
    now = digest(settings)
    return (*(held for held in record.digests if held != now), now)


def require_command(folder: Path, record: Record, command: str) -> None:
    """Raise ConfigError unless the run is one of ``command``."""
    if record.command != command:
        raise ConfigError(f"{folder} is a run of {record.command!r}: expected rlfusion {record.command} --resume")


def _again(folder: Path, command: str, settings: Any, error: Exception) -> Record:
    """The record of a run that has none: a new one, or what its newest checkpoint says."""
    now = flat(settings)
    new = Record(command, secrets.token_hex(16), plain(settings), now, (digest(now),))
    checkpoints = folder / "checkpoints"
    if not os.path.lexists(checkpoints):
        return new
    manifest = checkpoint.newest_manifest(checkpoints)
    if manifest is None or manifest["settings"] not in new.digests:
        why = str(error) if isinstance(error, ConfigError) else f"{str(folder / FILE)!r} is missing"
        raise ConfigError(
            f"{why}, and no checkpoint was saved under the settings of config.yaml: put {FILE} or the settings back, "
            "or keep config.yaml, remove the folder, and begin again with --config"
        )
    return replace(new, run=manifest["run"], saved=True)


def too_short(folder: Path, done: int, total: int) -> str:
    """The sentence for a run that shall end before where it is."""
    return f"{folder} has done {done} updates already, and its settings say {total}: expected {done} at least"


def done(folder: Path) -> int:
    """The updates that the newest checkpoint of the run in ``folder`` has, by its name; 0 for none."""
    return max((step for step, _ in checkpoint.candidates(folder / "checkpoints")), default=0)


def differs(folder: Path, changed: Mapping[str, tuple[Any, Any]]) -> str:
    """The sentence for settings that are not those of the run in ``folder``, {name: (old, new)}."""
    changes = [_difference(name, *pair) for name, pair in changed.items()]
    more = f" and {len(changes) - SAID} more" if len(changes) > SAID else ""
    name, (_, new) = next(iter(changed.items()))
    if name.startswith(FILES):
        name, new = FILES.rstrip("."), EDITED
    return (
        f"{folder} was begun with other settings: {'; '.join(changes[:SAID])}{more}; put them back, or say "
        f"--change {shlex.quote(f'{name}={_text(new)}')} where that is meant"
    )


def _difference(name: str, old: Any, new: Any) -> str:
    """A difference in words."""
    if name.startswith(FILES):
        return f"the file {name.removeprefix(FILES)} has SHA-256 {str(new)[:12]}, had {str(old)[:12]}"
    return f"{name} = {shown(new)}, was {shown(old)}"


def _text(value: Any) -> str:
    """A value as it is typed."""
    return value if isinstance(value, str) else json.dumps(value)


def change(folder: Path, record: Record, settings: Any, meant: Iterable[str] = ()) -> None:
    """Record that the run goes on with ``settings`` from here on, on purpose; ``meant`` were named, changed or not."""
    now = flat(settings)
    moved = differences(record.settings, now)
    changed = {name: list(pair) for name, pair in moved.items() if name not in PLACE}
    content = [name for name in meant if name not in changed and name in record.inputs]
    new = [name for name in added(record.settings, settings) if name in changed]
    also = {"content": content, "added": new}
    one = {"after": done(folder), "settings": changed} | {name: held for name, held in also.items() if held}
    changes = (*record.changes, one)
    kept = {name: held for name, held in record.inputs.items() if not _touched(name, (*changed, *meant))}
    said: dict[str, Any] = {"config": plain(settings), "settings": now, "changes": changes, "inputs": kept}
    sealed = record.sealed if changed and len(new) == len(changed) and not content else None
    replace(record, **said, digests=_then(record, now), sealed=sealed).write(folder)


def _touched(name: str, changed: Iterable[str]) -> bool:
    """Whether the content that the setting ``name`` stands for depends on a setting that is changed."""
    if name == REWARD:
        return any(key == REWARD or key.startswith(f"{REWARD}.") for key in changed)
    return any(
        key.rpartition(".")[0] == name.rpartition(".")[0] for key in changed if key.rpartition(".")[2] in CONTENT
    )
