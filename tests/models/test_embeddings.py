"""The embeddings of prompts: each text's once, in memory or mapped from shards, and prompts that are too long."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from rlfusion.common import notices
from rlfusion.common.errors import StorageError
from rlfusion.common.weights import pack, unpack
from rlfusion.models import pipelines
from rlfusion.models.pipelines import embeddings, hub, lengths
from rlfusion.models.pipelines.embeddings import Texts, encoded, kept

TEXTS = [f"prompt {i % 7}" for i in range(10)]
NEGATIVES = ["", "dark", "", "dark", "bright"] * 2


class Encoder:
    """One number a text; counts what it is asked."""

    def __init__(self, negated: bool = True) -> None:
        self.asked, self.negated = [], negated

    def __call__(self, part: str, text: str):
        self.asked.append((part, text))
        if part == "negative" and not self.negated:
            return None
        return {"text": torch.full((1, 2, 3), float(sum(map(ord, part + text)))), "ids": torch.tensor([[len(text)]])}


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(embeddings, "SHARD", 3)


def expected(part: str, text: str) -> float:
    return float(sum(map(ord, part + text)))


@pytest.mark.parametrize("resident", [2**30, 0])
@pytest.mark.parametrize("negated", [True, False])
def test_each_text_is_encoded_once_and_looked_up_by_condition(resident, negated, tmp_path, monkeypatch, small_shards):
    monkeypatch.setattr(embeddings, "RESIDENT", resident)
    encoder, texts = Encoder(negated), Texts.of(TEXTS, NEGATIVES)
    made = encoded(texts, encoder, tmp_path / "held")
    assert len(encoder.asked) == len(set(encoder.asked)) == 7 + (3 if negated else 1)
    for conditions in (made, kept(tmp_path / "held", texts), encoded(texts, Encoder(negated), None)):
        assert (conditions.count, conditions.negated) == (10, negated)
        index = torch.tensor([9, 0, 2, 2, 7])
        rows = conditions(index, torch.float64)
        assert rows["text"].dtype == torch.float64
        assert rows["ids"].dtype == torch.int64
        assert rows["text"].shape == (5, 2, 3)
        assert rows["text"][:, 0, 0].tolist() == [expected("prompt", TEXTS[i]) for i in index]
        if negated:
            null = conditions(torch.cat([index, conditions.null(index)]), torch.float32)["text"][5:, 1, 2]
            assert null.tolist() == [expected("negative", NEGATIVES[i]) for i in index]
    assert bool(made.table) == bool(resident)


def flipped(blob: bytes) -> bytes:
    return blob[:-9] + bytes([blob[-9] ^ 1]) + blob[-8:]


@pytest.mark.parametrize("harm", [flipped, lambda b: b[:-3], lambda b: b"", lambda b: b"junk" * 9, "without a digest"])
@pytest.mark.parametrize("part", ["prompt-00001", "negative-00000"])
def test_a_damaged_file_is_told_and_made_again(part, harm, tmp_path, small_shards):
    texts, file = Texts.of(TEXTS, NEGATIVES), tmp_path / f"{part}.safetensors"
    encoded(texts, Encoder(), tmp_path)
    whole = file.read_bytes()
    file.write_bytes(pack(unpack(whole)) if isinstance(harm, str) else harm(whole))
    with pytest.warns(UserWarning, match=f"{part}.safetensors' are damaged; they are made again"):
        assert kept(tmp_path, texts) is None
    again = Encoder()
    encoded(texts, again, tmp_path)
    assert file.read_bytes() == whole
    assert {asked for asked, _ in again.asked} == {part.partition("-")[0]}


def test_a_mapped_file_that_is_cut_is_made_again(tmp_path, monkeypatch, small_shards):
    monkeypatch.setattr(embeddings, "RESIDENT", 0)
    texts, file = Texts.of(TEXTS, NEGATIVES), tmp_path / "prompt-00001.safetensors"
    encoded(texts, Encoder(), tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.warns(UserWarning, match="are damaged"):
        assert kept(tmp_path, texts) is None


def test_encoding_goes_on_where_it_was_killed(tmp_path, small_shards):
    texts, encoder = Texts.of(TEXTS, NEGATIVES), Encoder()

    def dies(part, text):
        if text == "prompt 4":
            raise KeyboardInterrupt
        return encoder(part, text)

    with pytest.raises(KeyboardInterrupt):
        encoded(texts, dies, tmp_path)
    assert kept(tmp_path, texts) is None
    again = Encoder()
    encoded(texts, again, tmp_path)
    assert [text for part, text in again.asked if part == "prompt"] == [f"prompt {i}" for i in range(3, 7)]


def test_what_the_disk_cannot_hold_is_refused_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(StorageError, match="the embeddings of 7 prompts take"):
        encoded(Texts.of(TEXTS, NEGATIVES), Encoder(), tmp_path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "limits"),
    [
        ("sd", {"tokenizer": 77}),
        ("sdxl", {"tokenizer": 77, "tokenizer_2": 77}),
        ("sd3", {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 256}),
        ("flux", {"tokenizer": 77, "tokenizer_2": 512}),
        ("sana", {"tokenizer": 299}),
        ("lcm", {"tokenizer": 77}),
    ],
)
def test_prompts_longer_than_an_encoder_reads_are_told_once(name, limits, tiny_pipelines, monkeypatch, caplog):
    monkeypatch.setattr(notices, "_said", set())
    folder = tiny_pipelines[name]
    family = hub.family(folder)
    for _ in range(2):
        lengths.report(folder, family, ["a cat", "x " * 600, "short " * 3, "y " * 601])
    told = {message.split(" that ")[1].split(" reads")[0]: message for message in caplog.messages}
    assert told.keys() == limits.keys()
    assert len(caplog.messages) == len(limits)
    for tokenizer, message in told.items():
        assert message.startswith(f"2 of 4 prompts are longer than the {limits[tokenizer]} tokens")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_limit_is_where_the_pipeline_cuts(tiny_pipelines, monkeypatch):
    """A token beyond the limit has no effect, one within it has, as the report says."""
    folder = tiny_pipelines["sd"]
    about = {"variant": "", "dtype": "float32", "checkpointing": False, "decode": 2, "cache": "", "adapters": []}
    about |= {"name": str(folder), "side": 16}
    fits, cut, same = "a " * 75, "a " * 76, "a " * 75 + "b"
    prompts = [fits, cut, same, "a " * 74 + "b"]
    rows = pipelines.build(about | {"negatives": [""] * 4}, prompts).net.conditions(torch.arange(4), torch.float32)[
        "text"
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[3])
    told = []
    monkeypatch.setattr(lengths, "say_once", told.append)
    lengths.report(folder, hub.family(folder), prompts)
    assert told[0].startswith("2 of 4 prompts are longer than the 77 tokens that tokenizer reads")
