"""The last words of the command line: memory that is not enough, and options called as they were typed."""

import os

import pytest
import torch

from rlfusion.cli import main
from rlfusion.common.errors import OutOfMemory, foreseen


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_is_not_enough_is_one_line_with_a_remedy(error):
    found = foreseen(error)
    assert isinstance(found, OutOfMemory)
    assert found.exit_code == 2
    assert "\n" not in str(found)
    assert "smaller agent.micro_batch, rollout.item" in str(found)
    assert foreseen(RuntimeError("shapes do not fit")) is None


def test_the_machines_own_refusal_is_one():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert isinstance(foreseen(caught.value), OutOfMemory)


def test_the_model_is_called_as_it_was_typed():
    text = "frechet_base = 1, base = 'x': expected y"
    assert main._as_typed(text, ["finetune", "--model", "x"]) == "frechet_base = 1, model = 'x': expected y"
    assert main._as_typed(text, ["finetune", "--model=x"]) == "frechet_base = 1, model = 'x': expected y"
    assert main._as_typed(text, ["finetune", "--base", "x"]) == text
    assert main._as_typed(text, ["finetune", "--model", "x", "--base", "x"]) == text


@pytest.mark.parametrize("agent", ["ddpo", "grpo"])
def test_a_pipelines_chain_without_noise_is_refused_before_any_folder(
    agent, tiny_pipelines, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "--agent", agent, "--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "a cat"]
    words += ["--lora", "LoRA()", "--chain.kernel", "DDIM(eta=0.0)", "--reward", "ink"]
    assert main.main(words) == 2
    assert "DDIM(eta=0.0) has no noise" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
