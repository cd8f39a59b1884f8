"""Pretraining and distillation on several ranks: a sample meets the same draws, and the bits are those of one rank."""

import pytest
import torch
from ranked import members
from ranked_fits import FITS, METHODS, OBJECTIVES, alone, fitted, method, work

from rlfusion import config, distill, pretrain
from rlfusion.common.errors import ConfigError
from rlfusion.config.parts import Learners

EXACT, SUMMED = (4, True), (4, False)
FEW, FEW_METHODS = ["CT(s1=8)", "dropout"], ["dmd"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranked")


@pytest.fixture(scope="module")
def two(folder):
    forms = [(EXACT, FITS, list(METHODS)), (SUMMED, FITS, [])]
    return members(2, work, forms, str(folder))


def test_every_objective_and_method_is_tried():
    assert {text.partition("(")[0] for text in OBJECTIVES} == set(pretrain.LOSSES.names())
    assert set(METHODS) == set(distill.METHODS.names())


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


@pytest.mark.parametrize("fit", FITS)
def test_sums_are_equal_to_rounding_and_alike_on_all_ranks(two, fit):
    first, second = (told[1][fit] for told in two)
    assert first == second
    _, _, weights = alone(SUMMED, fitted, fit)
    torch.testing.assert_close(torch.tensor(first[2]), torch.tensor(weights), rtol=0, atol=1e-5)


def test_four_ranks_give_the_bits_of_one(tmp_path):
    four = members(4, work, [(EXACT, FEW, FEW_METHODS)], str(tmp_path))
    wanted = {fit: list(alone(EXACT, fitted, fit)) for fit in FEW}
    wanted |= {name: list(alone(EXACT, method, name, tmp_path / "alone")) for name in FEW_METHODS}
    for told in four:
        assert told == [wanted]


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


@pytest.mark.parametrize("settings", [config.Pretrain, config.Autoencode, config.Distill])
def test_a_network_that_is_split_is_refused(settings):
    with pytest.raises(ConfigError, match=r"learner.shard = fsdp: finetune alone splits .* expected none"):
        settings(learner=Learners(ranks=2, shares=2, shard="fsdp"))


def test_two_ranks_go_on_with_what_one_began(folder, tmp_path):
    whole = alone(EXACT, method, "vsd", tmp_path / "whole")
    alone(EXACT, method, "vsd", tmp_path / "0-vsd", 1)
    told = members(2, work, [(EXACT, [], ["vsd"])], str(tmp_path))
    assert [one[0]["vsd"][0] for one in told] == [whole[0]] * 2
