"""No rank of a network that is split ever holds all of its weights: read, copied, or saved."""

from pathlib import Path

import pytest
import torch
from anonymous import STATUS, give_back, peak
from ranked import members

from rlfusion import models
from rlfusion.common import layers, on_disk, shards, storage
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.grid import TimeGrid
from rlfusion.diffusion.policy import Policy, frozen_copy
from rlfusion.models import Card, Config
from rlfusion.rl.chain_value import ChainValue, Settings
from rlfusion.rl.critic import make_critic
from rlfusion.rollout import Task
from rlfusion.training import publishing
from rlfusion.training.ranks import Ranks, joined

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours"),
    pytest.mark.skipif(not STATUS.is_file(), reason="reads /proc"),
]
WIDTH, DEPTH, MB = 1024, 8, 2**20
CARD = Card(Config(f"ResidualMLP(width={WIDTH}, depth={DEPTH})", "Cosine()", "x0"), (1, 8, 8), ("a", "b"))
LARGEST = 2 * WIDTH * WIDTH * 4
SLACK = 8 * MB
"""Of the interpreter, and of what the allocator keeps."""


def _task(policy: Policy) -> Task:
    return Task(policy, TimeGrid(2), CARD.shape, torch.arange(2), lambda x: x, lambda x, c: x.mean((1, 2, 3)), "mean")


def _work(rank: int, count: int, folder: str, lora: str) -> dict[str, int]:
    found: dict[str, int] = {}
    give_back()
    with joined(Ranks(rank, count, count, exact=True)):
        with peak(found, "read"):
            denoiser, card, filling = models.load_hollow(Path(folder))
            models.adapt(denoiser, card, lora)
            shards.split(denoiser.net, torch.device("cpu"), True, filling)
        layer = 4 * (4 * WIDTH * WIDTH + 4 * WIDTH)
        assert lora or layers.largest(denoiser.net) == layer
        with peak(found, "drawn"):
            new = models.build(CARD, 1, within=on_disk.parameters())
            shards.split(new.net, torch.device("cpu"), True)
        policy = Chain(steps=2).policy(denoiser, card.names)
        with peak(found, "value and its average"):
            value = ChainValue(_task(policy), Settings(value_net=CARD.config.net), 2)
        with peak(found, "critic"):
            critic = make_critic(CARD.config.net, _task(policy), 3)
        assert len(shards.roots(value.value)) == len(shards.roots(critic)) == 2  # the network and the head
        assert publishing.in_files(policy, True) == (not lora)
        assert not publishing.in_files(policy, False)
        with peak(found, "copied"):
            copy = frozen_copy(policy)
        assert copy is not policy
        with peak(found, "saved"):
            if rank:
                with storage.silent():
                    models.save(Path(folder) / "again", denoiser, card)
            else:
                models.save(Path(folder) / "again", denoiser, card)
    return found


@pytest.mark.parametrize("lora", ["", "LoRA(rank=2)"])
def test_a_rank_holds_its_rows_and_a_tensor_at_most(lora, tmp_path):
    models.save(tmp_path, models.build(CARD), CARD)
    whole = (tmp_path / "weights.safetensors").stat().st_size
    assert whole > 8 * LARGEST
    for found in members(2, _work, str(tmp_path), lora):
        assert found["read"] < whole / 2 + 2 * LARGEST + SLACK
        assert found["drawn"] < whole / 2 + 2 * LARGEST + SLACK
        assert found["critic"] < whole / 2 + 2 * LARGEST + SLACK
        assert found["value and its average"] < whole + 2 * LARGEST + SLACK
        assert found["copied"] < (0 if lora else whole / 2) + 2 * LARGEST + SLACK
        assert found["saved"] < 5 * LARGEST + SLACK < whole / 2
    ours = (tmp_path / "again" / "weights.safetensors").read_bytes()
    assert ours == (tmp_path / "weights.safetensors").read_bytes()
