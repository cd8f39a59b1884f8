"""Pretraining and distillation on several ranks: a sample meets the same draws, and the bits are those of one rank."""

import pytest
import torch
from ranked import members
from ranked_fits import FITS, METHODS, OBJECTIVES, alone, begun, fitted, method, work
from safetensors.torch import load_file

from rlfusion import config, distill, pretrain
from rlfusion.common import shards
from rlfusion.common.errors import ConfigError
from rlfusion.config.parts import Learners
from rlfusion.training import checkpoint

EXACT, SUMMED = (4, True), (4, False)
SPLIT, SPLIT_SUMMED = (4, True, True), (4, False, True)
FEW, FEW_METHODS = ["CT(s1=8)", "dropout"], ["dmd"]
SPLITS = shards.can_split()
OF_SPLIT = pytest.mark.skipif(not SPLITS, reason="needs an FSDP2 that takes sums of ours")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranked")


@pytest.fixture(scope="module")
def two(folder):
    forms = [(EXACT, FITS, list(METHODS)), (SUMMED, FITS, [])]
    split = [(SPLIT, FITS, list(METHODS)), (SPLIT_SUMMED, FEW, [])]
    return members(2, work, [*forms, *(split if SPLITS else [])], str(folder))


def test_every_objective_and_method_is_tried():
    assert {text.partition("(")[0] for text in OBJECTIVES} == set(pretrain.LOSSES.names())
    assert {name.partition(" ")[0] for name in METHODS} == set(distill.METHODS.names())


@pytest.mark.parametrize("fit", FITS)
def test_two_ranks_give_the_bits_of_one(two, fit):
    digest, metrics, _ = alone(EXACT, fitted, fit)
    for told in two:
        assert told[0][fit][0] == digest
        assert told[0][fit][1] == metrics


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_distil_to_the_bits_of_one(two, name, tmp_path):
    digest, metrics = alone(EXACT, method, name, tmp_path)
    for told in two:
        assert told[0][name] == [digest, metrics]


@OF_SPLIT
@pytest.mark.parametrize("name", [*FITS, *METHODS])
def test_networks_that_are_split_end_in_the_bits_of_whole_ones(two, name):
    """Students, averages, teachers, fakes and discriminators; with their moments, and all metrics."""
    for told in two:
        assert told[2][name] == told[0][name]


@OF_SPLIT
@pytest.mark.parametrize("name", METHODS)
def test_each_of_two_ranks_keeps_half_of_a_distillation(two, folder, name):
    """Of what a checkpoint has of it: parameters, moments and averages of all networks."""
    whole = sum(sizes(folder / f"0-{name}").values())
    split = sizes(folder / f"2-{name}")
    beside = sum(size for file, size in split.items() if ".rows-" not in file)
    for rank in range(2):
        own = sum(size for file, size in split.items() if f".rows-{rank}-of-2." in file)
        assert own + beside <= 0.55 * whole


def sizes(folder):
    """Bytes of the tensors in each file of the newest checkpoint."""
    found = {}
    for file in checkpoint.latest(folder / "checkpoints").path.glob("*.safetensors"):
        tensors = load_file(file).values()
        found[file.name] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return found


@pytest.mark.parametrize(
    ("fit", "form"), [*((fit, 1) for fit in FITS), *(pytest.param(fit, 3, marks=OF_SPLIT) for fit in FEW)]
)
def test_sums_are_equal_to_rounding_and_alike_on_all_ranks(two, fit, form):
    first, second = (told[form][fit] for told in two)
    assert first == second
    _, _, weights = alone(SUMMED, fitted, fit)
    torch.testing.assert_close(torch.tensor(first[2]), torch.tensor(weights), rtol=0, atol=1e-5)


def test_four_ranks_give_the_bits_of_one(tmp_path):
    forms = [(form, FEW, FEW_METHODS) for form in ([EXACT, SPLIT] if SPLITS else [EXACT])]
    four = members(4, work, forms, str(tmp_path))
    wanted = {fit: list(alone(EXACT, fitted, fit)) for fit in FEW}
    wanted |= {name: list(alone(EXACT, method, name, tmp_path / "alone")) for name in FEW_METHODS}
    for told in four:
        assert told == [wanted] * len(forms)


@pytest.mark.parametrize("fit", [fit for fit in FITS if fit != "dropout"])
def test_shares_are_the_whole_batch_to_rounding(fit):
    _, whole, weights = alone((1, False), fitted, fit)
    _, parts, others = alone(SUMMED, fitted, fit)
    torch.testing.assert_close(torch.tensor(others), torch.tensor(weights), rtol=0, atol=2e-4)
    for one, other in zip(whole, parts):
        assert other == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_shares_distil_as_the_whole_batch(name, tmp_path):
    _, whole = alone((1, False), method, name, tmp_path / "whole")
    _, parts = alone(SUMMED, method, name, tmp_path / "parts")
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=2e-3)


def test_of_fewer_samples_than_shares_none_is_learned():
    with pytest.raises(ConfigError, match=r"batch = 10: expected a sample at least in each of learner.shares = 16"):
        alone((16, False), fitted, FITS[0])


SPLIT_RANKS = Learners(ranks=2, shares=2, shard="fsdp")


@pytest.mark.parametrize("settings", [config.Pretrain, config.Autoencode, config.Distill])
def test_a_device_on_which_no_network_is_split_is_refused(settings):
    settings(learner=SPLIT_RANKS)
    with pytest.raises(ConfigError, match=r"device = mps with learner.shard = fsdp: expected one of auto, cpu, cuda"):
        settings(learner=SPLIT_RANKS, device="mps")


def test_an_optimiser_that_looks_at_whole_parameters_is_refused_to_split():
    optimizer = "torch.optim:Adafactor"
    makers = [
        lambda: config.Pretrain(learner=SPLIT_RANKS, train=pretrain.Config(optimizer=optimizer)),
        lambda: config.Autoencode(learner=SPLIT_RANKS, optimizer=optimizer),
        lambda: config.Distill(learner=SPLIT_RANKS, method=distill.METHODS["dmd"](optimizer=optimizer)),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match=r"with learner\.shard = fsdp: it may look at whole parameters"):
            make()


@pytest.mark.parametrize("form", [EXACT, pytest.param(SPLIT, marks=OF_SPLIT)], ids=["whole", "split"])
def test_two_ranks_go_on_with_what_one_began(tmp_path, form):
    whole = alone(EXACT, method, "vsd", tmp_path / "whole")
    alone(EXACT, method, "vsd", tmp_path / "0-vsd", 1)
    told = members(2, work, [(form, [], ["vsd"])], str(tmp_path))
    assert [one[0]["vsd"][0] for one in told] == [whole[0]] * 2


@OF_SPLIT
def test_one_goes_on_with_what_ranks_that_split_began(tmp_path):
    whole = alone(EXACT, method, "dmd", tmp_path / "whole")
    members(2, begun, SPLIT, "dmd", str(tmp_path / "begun"))
    assert alone(EXACT, method, "dmd", tmp_path / "begun")[0] == whole[0]
