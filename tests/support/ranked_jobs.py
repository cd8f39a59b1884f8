"""Jobs on ranks that are plain processes of a gloo group, without Ray: what each of them ends in."""

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from processes import CONTEXT, PATIENCE

from rlfusion.cli.ranked import JOBS
from rlfusion.common import storage
from rlfusion.common.progress import Progress
from rlfusion.common.stops import Signals
from rlfusion.training.ranks import Ranks, joined


def job(cwd: Path, command: str, *arguments: Any) -> None:
    """``rlfusion COMMAND ARGUMENTS`` in ``cwd``, on the ranks that this process is one of."""
    from rlfusion.cli.arguments import settings_of

    os.chdir(cwd)
    settings = settings_of(command, [str(argument) for argument in arguments])
    folder = Path(settings.root) / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    JOBS[command](settings, folder, Signals(), Progress(True))


def _rank(rank: int, count: int, group: str, cwd: Path, work: list[tuple[Any, ...]]) -> None:
    from rlfusion.cli.arguments import settings_of

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = torch.distributed.FileStore(f"{group}/store", count)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=count)
    for command, *arguments in work:
        held = settings_of(command, [str(argument) for argument in arguments]).learner
        with joined(Ranks(rank, count, held.shares, held.exact)), storage.silent() if rank else nullcontext():
            job(cwd, command, *arguments)
    torch.distributed.destroy_process_group()


def jobs_on_ranks(count: int, cwd: Path, *work: tuple[Any, ...]) -> None:
    """Some jobs, one after another, each on ``learner.ranks`` = ``count``: a command and its arguments, or those of a
    fine-tuning.
    """
    commands = [arguments if arguments[0] in JOBS else ("finetune", *arguments) for arguments in work]
    given = [(*arguments, "--learner.ranks", count) for arguments in commands]
    with tempfile.TemporaryDirectory() as group:
        members = [CONTEXT.Process(target=_rank, args=(rank, count, group, cwd, given)) for rank in range(count)]
        for member in members:
            member.start()
        for member in members:
            member.join(PATIENCE)
        codes = [member.exitcode for member in members]
        for member in members:
            member.kill()
    assert codes == [0] * count
