"""``--compile graphs``: what is recorded, when it is recorded anew, and that no answer is overwritten. A stand-in for a
CUDA graph calls the network again and writes its answer where the first one lay; ``tests/cuda`` has the real ones.
"""

import pytest
import torch

from rlfusion.common import compiled, replayed
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.policy import frozen_copy
from rlfusion.nets.mlp import ResidualMLP

SHAPE = (1, 4, 4)


class Graphs:
    """The calls that were recorded, and how often they were played."""

    def __init__(self):
        self.recorded = self.played = 0

    def __call__(self, call, memory):
        self.recorded += 1
        answer = call()

        def play():
            self.played += 1
            answer.copy_(call())

        return answer, play


@pytest.fixture
def graphs(monkeypatch):
    made = Graphs()
    monkeypatch.setattr(replayed, "recorded", made)
    monkeypatch.setattr(replayed, "DEVICE", "cpu")
    return made


def network() -> ResidualMLP:
    torch.manual_seed(0)
    net = ResidualMLP(SHAPE, 2, width=8, depth=1)
    for p in net.parameters():
        torch.nn.init.normal_(p)
    return net


def inputs(rows: int, seed: int):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *SHAPE, generator=draw), torch.rand(rows, generator=draw), torch.zeros(rows).long()


def test_calls_of_one_size_are_recorded_once_and_each_has_its_own_answer(graphs):
    net, plain = network(), network()
    compiled.compile_calls(net, "graphs")
    with torch.no_grad():
        found = [net(*inputs(3, seed)) for seed in range(3)]
        expected = [plain(*inputs(3, seed)) for seed in range(3)]
        assert all(map(torch.equal, found, expected))  # the last replay has not written into the first answers
        assert (graphs.recorded, graphs.played) == (1, 3)
        assert torch.equal(net(*inputs(5, 0)), plain(*inputs(5, 0)))
        assert graphs.recorded == 2
        net(inputs(3, 0)[0], t=inputs(3, 0)[1], label=inputs(3, 0)[2])
        assert graphs.recorded == 3  # given by name is another call


def test_calls_with_gradients_are_those_of_the_network(graphs):
    net = network()
    compiled.compile_calls(net, "graphs")
    net(*inputs(3, 0)).sum().backward()
    assert graphs.recorded == 0
    assert all(p.grad is not None for p in net.parameters())


def test_what_is_written_into_weights_is_replayed_and_weights_in_another_place_are_recorded_anew(graphs):
    net, plain = network(), network()
    compiled.compile_calls(net, "graphs")
    with torch.no_grad():
        net(*inputs(3, 0))
        for one in (net, plain):
            for p in one.parameters():
                p.mul_(1.5)
        assert torch.equal(net(*inputs(3, 1)), plain(*inputs(3, 1)))
        assert graphs.recorded == 1
        net.leave.weight.data = net.leave.weight.data.clone()
        assert torch.equal(net(*inputs(3, 2)), plain(*inputs(3, 2)))
        assert graphs.recorded == 2


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_calls_in_another_precision_or_manner_are_recorded_by_themselves(graphs):
    net = network()
    compiled.compile_calls(net, "graphs")
    with torch.no_grad():
        net(*inputs(3, 0))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            net(*inputs(3, 0))
        net.eval()
        net(*inputs(3, 0))
        assert graphs.recorded == 3
        net(*inputs(3, 1))
        assert graphs.recorded == 3


def test_a_call_of_inference_mode_serves_those_without_gradients(graphs):
    net, plain = network(), network()
    compiled.compile_calls(net, "graphs")
    with torch.inference_mode():
        net(*inputs(3, 0))
    with torch.no_grad():
        assert torch.equal(net(*inputs(3, 1)), plain(*inputs(3, 1)))
    assert graphs.recorded == 1


def test_another_word_is_refused():
    with pytest.raises(ConfigError, match="compile = 'graph': expected true, false or graphs"):
        compiled.compile_calls(network(), "graph")


def test_no_more_kinds_of_calls_are_recorded_than_that(graphs, monkeypatch):
    monkeypatch.setattr(replayed, "MOST", 2)
    net, plain = network(), network()
    compiled.compile_calls(net, "graphs")
    with torch.no_grad():
        for rows in (1, 2, 3):
            assert torch.equal(net(*inputs(rows, 0)), plain(*inputs(rows, 0)))
    assert graphs.recorded == 2


def test_copies_replay_by_themselves_and_within_plain_nothing_does(graphs):
    net = network()
    compiled.compile_calls(net, "graphs")
    twin = frozen_copy(net)
    with torch.no_grad():
        net(*inputs(2, 0))
        twin(*inputs(2, 0))
        assert graphs.recorded == 2
        with compiled.plain(net):
            net(*inputs(7, 0))
    assert graphs.recorded == 2


def test_a_cpu_is_refused_in_one_line():
    net = network()
    compiled.compile_calls(net, "graphs")
    with (
        torch.no_grad(),
        pytest.raises(ConfigError, match=r"compile = graphs: .*'cpu', expected compile true or false") as refused,
    ):
        net(*inputs(2, 0))
    assert "\n" not in str(refused.value)


def test_a_network_that_cannot_be_recorded_is_refused_by_its_name(graphs, monkeypatch):
    def waits(call, memory):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(replayed, "recorded", waits)
    net = network()
    compiled.compile_calls(net, "graphs")
    with torch.no_grad(), pytest.raises(ConfigError, match=r"calls of ResidualMLP cannot be recorded .*capturing\)"):
        net(*inputs(2, 0))
