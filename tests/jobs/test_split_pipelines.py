"""Fine-tunings of diffusers' pipelines whose network is split over two ranks end in the bits of one process."""

import pytest
import torch
from ranked_jobs import jobs_on_ranks
from split_pipelines import run, weights

from rlfusion.common import shards

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not shards.can_split(), reason="needs an FSDP2 that takes sums of ours"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ADAPTERS = "LoRA(rank=2)"
KINDS = {
    "sd, ddpo, adapters": ("sd", "ddpo", ADAPTERS),
    "sd3, grpo, all weights": ("sd3", "grpo", ""),
    "flux, nft, adapters on bfloat16": ("flux", "nft", ADAPTERS, "--pipeline.dtype", "bfloat16"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_pipelines):
    cwd = tmp_path_factory.mktemp("split_pipelines")
    given = [(*run(cwd, tiny_pipelines[of], *how), "--name") for of, *how in KINDS.values()]
    jobs_on_ranks(1, cwd, *((*arguments, f"run-{i}") for i, arguments in enumerate(given)))
    split = ("--learner.shard", "fsdp")
    jobs_on_ranks(2, cwd, *((*arguments, f"run-{i}-split", *split) for i, arguments in enumerate(given)))
    return cwd / "runs"


@pytest.mark.parametrize("at", range(len(KINDS)), ids=KINDS)
def test_a_pipeline_that_is_split_ends_in_the_bits_of_one_process(at, runs):
    one, two = weights(runs / f"run-{at}"), weights(runs / f"run-{at}-split")
    assert one.keys() == two.keys()
    assert one
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_what_was_written_row_by_row_is_a_whole_pipeline(runs):
    one, two = (runs / name / "model" for name in ("run-1", "run-1-split"))
    files = [sorted(str(f.relative_to(place)) for f in place.rglob("*")) for place in (one, two)]
    assert files[0] == files[1]
