"""Files that are written tensor by tensor have the bytes of those that are written at once, or are not there."""

import hashlib
import os

import pytest
import safetensors.torch
import torch

from rlfusion.common import storage, streamed
from rlfusion.common.errors import StorageError


def tensors() -> dict[str, torch.Tensor]:
    """Of every dtype, in an order that is not the file's; names that JSON writes in its own way."""
    held = {"none": torch.empty(0, 3), "single": torch.tensor(2.0), "turned": torch.arange(6.0).reshape(2, 3).T}
    for i, dtype in enumerate(streamed.KINDS):
        held[f'b{99 - i}é"\\'] = torch.arange(6).reshape(2, 3).to(dtype)
        held[f"a{i}"] = torch.ones(3).to(dtype)
    return held


@pytest.mark.parametrize("metadata", [None, {"ü": "{}"}])
def test_the_bytes_are_those_of_safetensors(metadata, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "CHUNK", 5)
    file, held = tmp_path / "a.safetensors", tensors()
    digest = streamed.write(file, {name: streamed.part(tensor) for name, tensor in held.items()}, metadata)
    plain = {name: tensor.contiguous() for name, tensor in held.items()}
    assert file.read_bytes() == safetensors.torch.save(plain, metadata)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    plainly = hashlib.sha256(safetensors.torch.save(plain)).hexdigest()
    assert streamed.digest({name: streamed.part(tensor) for name, tensor in held.items()}) == plainly


def test_one_tensor_is_there_at_a_time_and_where_nothing_is_written_all_are_made(tmp_path):
    made: list[str] = []

    def parts() -> dict[str, streamed.Part]:
        held = {"b": torch.ones(2), "a": torch.zeros(3), "c": torch.ones(1, dtype=torch.int64)}
        return {n: streamed.part(t, lambda n=n, t=t: made.append(n) or t) for n, t in held.items()}

    streamed.write(tmp_path / "x", parts())
    with storage.silent():
        streamed.write(tmp_path / "y", parts())
    assert made == ["c", "a", "b"] * 2
    assert not (tmp_path / "y").exists()


def test_a_disk_that_is_full_leaves_what_was_there(tmp_path, monkeypatch):
    file = tmp_path / "x"
    file.write_bytes(b"old")
    monkeypatch.setenv(storage.VARIABLE, "0")
    real, taken = os.write, []

    def write(held: int, some: bytes) -> int:
        taken.append(len(some))
        if len(taken) > 2:
            raise OSError(28, "No space left on device")
        return real(held, some)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(StorageError, match="No space left"):
        streamed.write(file, {"a": streamed.part(torch.ones(2)), "b": streamed.part(torch.ones(3))})
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
