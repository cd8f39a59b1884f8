"""Settings of a pretrained pipeline: each means what it means in diffusers, or is refused; none is left out."""

import pytest
import torch
from saved_models import CARD, scrambled
from tiny_pipelines import PROMPTS, agree, flux

from rlfusion import models
from rlfusion.cli import main
from rlfusion.common.errors import ConfigError
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.sampling import sample
from rlfusion.models import pipelines
from rlfusion.models.pipelines import Settings, Whole, lengths
from rlfusion.models.pipelines.settings import UNTOLD

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 2
OWN = {"flux": 512, "schnell": 256, "sd3": 256, "sana": 300}
"""max_sequence_length as the model cards have it: that of schnell is not the default of its pipeline's call."""

BESIDE = {"sd3": 77}
"""Tokens of other encoders in the same sequence."""


@pytest.fixture(scope="module")
def folders(tiny_pipelines, tmp_path_factory) -> dict:
    schnell = tmp_path_factory.mktemp("schnell")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        flux(guidance=False).save_pretrained(schnell)
    return {**tiny_pipelines, "schnell": schnell}


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "p.txt")


@pytest.mark.parametrize("name", OWN)
def test_the_length_of_a_prompt_is_that_of_the_model_card_and_of_diffusers_over_its_range(name, folders, prompts):
    folder, ends = folders[name], []
    for told in (0, 9, 300):
        settings = Settings(prompts=prompts, size=32 if name == "sana" else 16, max_sequence_length=told)
        card = models.describe(str(folder), settings)
        denoiser, length = models.build(card), told or OWN[name]
        rows = denoiser.net.conditions(torch.arange(2), torch.float32)
        assert rows["text"].shape[1] == length + BESIDE.get(name, 0)
        shape = denoiser.space.latent(card.shape)
        z = torch.randn(1, STEPS + 1, *shape, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1, 1)
        chain = Chain(steps=STEPS, spacing="model", kernel=denoiser.own.sampling.kernel, guidance_scale=2.0)
        ours = sample(chain.policy(denoiser, card.names), z, chain.times(denoiser), torch.arange(2))
        plain = {key: held for key, held in card.pipeline.items() if key != "max_sequence_length"}
        theirs = Whole(plain).latents(PROMPTS, [0, 1], z, guidance_scale=2.0, max_sequence_length=length)
        agree(ours, theirs)
        agree(ours, Whole(card.pipeline).latents(PROMPTS, [0, 1], z, guidance_scale=2.0))
        ends.append(ours)
    assert not torch.equal(ends[0], ends[1]), "the length has an effect"


def test_a_length_moves_the_limit_of_what_is_told_of_long_prompts(folders, monkeypatch):
    told = []
    monkeypatch.setattr(lengths, "say_once", told.append)
    for name, sequence, limit in (("schnell", 256, 256), ("flux", 9, 9), ("sd3", 300, 300), ("sana", 300, 299)):
        lengths.report(folders[name], pipelines.family_of(folders[name]), ["x " * 600], sequence)
        assert any(f"the {limit} tokens" in message for message in told), name
        told.clear()


def test_a_length_is_a_part_of_what_embeddings_are_kept_by(folders, prompts, tmp_path):
    for told in (0, 9):
        settings = Settings(prompts=prompts, size=16, max_sequence_length=told)
        models.build(models.describe(str(folders["flux"]), settings, "", tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("name", "told", "said"),
    [
        ("sd", 77, "StableDiffusionPipeline has no such setting, expected 0"),
        ("sdxl", 256, "StableDiffusionXLPipeline has no such setting"),
        ("flux", 513, "expected 512 at most for FluxPipeline, or 0 for its own, 512"),
        ("schnell", 1000, "or 0 for its own, 256"),
        ("sd3", 513, "expected 512 at most"),
    ],
)
def test_a_length_that_cannot_be_is_refused(name, told, said, folders):
    with pytest.raises(ConfigError, match=f"max_sequence_length = {told}: .*{said}"):
        models.describe(str(folders[name]), Settings(prompts="a cat", size=16, max_sequence_length=told))


@pytest.fixture
def saved(folders, tmp_path):
    """The folder of a run that saved a pipeline."""
    card = models.describe(str(folders["flux"]), Settings(prompts="a cat", size=16, max_sequence_length=9))
    models.save(tmp_path / "run" / "model", models.build(card), card)
    return str(tmp_path / "run")


def test_what_is_said_of_a_saved_pipeline_replaces_what_it_was_saved_with(saved):
    card = models.describe(saved, Settings())
    assert (card.shape, card.names, card.pipeline["max_sequence_length"]) == ((3, 16, 16), ("a cat",), 9)
    said = {"dtype": "bfloat16", "vae_dtype": "bfloat16", "checkpointing": True, "decode": 3}
    said |= {"size": 32, "max_sequence_length": 20}
    other = models.describe(saved, Settings(prompts="two dogs", **said))
    assert (other.shape, other.names) == ((3, 32, 32), ("two dogs",))
    assert {key: other.pipeline["side" if key == "size" else key] for key in said} == said
    denoiser = models.build(other)
    assert denoiser.net.model.dtype == torch.bfloat16
    assert denoiser.net.conditions(torch.arange(1), torch.float32)["text"].shape[1] == 20
    assert models.describe(saved, Settings(size=16)) == card


def test_what_a_new_pipeline_would_have_replaces_what_a_saved_one_has_where_it_is_said(saved, tmp_path):
    said = {"dtype": "bfloat16", "vae_dtype": "bfloat16", "checkpointing": True, "decode": 3}
    card = models.describe(saved, Settings(**said))
    models.save(tmp_path / "other" / "model", models.build(card), card)
    again = str(tmp_path / "other")
    assert {key: models.describe(again, Settings()).pipeline[key] for key in said} == said
    for key, plain in UNTOLD.items():
        held = models.describe(again, Settings(**{key: plain})).pipeline
        assert {name: held[name] for name in said} == said | {key: plain}
    assert models.build(models.describe(again, Settings(dtype="float32"))).net.model.dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "fp16"}, "variant = 'fp16': .* was saved with variant '', expected none"),
        ({"family": "SanaPipeline"}, "was saved with family '', expected none"),
        ({"prompt_column": "caption"}, "prompt_column or encoding = 'caption': expected pipeline.prompts"),
        ({"encoding": "latin-1"}, "prompt_column or encoding = 'latin-1'"),
        ({"size": 17}, "size = 17: expected a multiple of"),
        ({"max_sequence_length": 600}, "expected 512 at most"),
    ],
)
def test_what_a_saved_pipeline_cannot_be_is_refused(settings, said, saved):
    with pytest.raises(ConfigError, match=said):
        models.describe(saved, Settings(**settings))


@pytest.mark.parametrize(
    "setting", ["prompts=a cat", "size=16", "dtype=float32", "checkpointing=false", "decode=8", "encoding=x"]
)
@pytest.mark.parametrize("command", ["sample", "evaluate", "check-model", "finetune", "compare"])
def test_settings_of_a_pipeline_for_another_model_are_refused_by_every_command(command, setting, tmp_path, capsys):
    folder = tmp_path / "own"
    models.save(folder, scrambled(CARD), CARD)
    option = {"sample": "--checkpoint", "evaluate": "--checkpoint"}.get(command, "--model")
    root = [] if command in ("sample", "check-model") else ["--root", str(tmp_path)]
    words = [command, option, str(folder), f"--pipeline.{setting}", *root]
    assert main.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "pipeline.* is given" in said[0]
    assert "is no pretrained pipeline: expected none" in said[0]
