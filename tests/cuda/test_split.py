"""A network that is split over a group of one GPU, by NCCL, trains what a whole one does."""

import os
import tempfile

import pytest
import torch
from processes import CONTEXT, PATIENCE
from ranked import trained

from rlfusion.training.ranks import Ranks, joined

AGENTS = ["ddpo(kl_loss=0.1)", "draft(steps=2)"]


def _one(folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 1)
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    for agent in AGENTS:
        for exact in (True, False):
            with joined(Ranks(0, 1, 2, exact)):
                (whole, _), (split, _) = (trained(agent, held, "cuda", "bfloat16") for held in (False, True))
            for ours, theirs in zip(split, whole):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_group_of_one_gpu_trains_what_a_whole_network_does():
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        member = CONTEXT.Process(target=_one, args=(folder,))
        member.start()
        member.join(PATIENCE)
        member.kill()
    assert member.exitcode == 0
