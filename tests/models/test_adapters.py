"""Adapters that exist: files of peft, diffusers and kohya are merged or trained on, and nothing of them is left out."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import lora_files
import pytest
import safetensors.torch
import torch
from lora_files import ALPHA, RANK, by_diffusers, by_kohya, by_peft, factors, merge
from pipeline_runs import ran, settings
from tiny_pipelines import PROMPTS, about, agree

from rlfusion import models
from rlfusion.cli.arguments import settings_of
from rlfusion.cli.main import main
from rlfusion.common import notices
from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import ADAPTER
from rlfusion.config import Rollout
from rlfusion.diffusion.chain import Chain
from rlfusion.diffusion.sampling import sample
from rlfusion.jobs.launch.inputs import Inputs
from rlfusion.jobs.runs import recorded
from rlfusion.models import pipelines
from rlfusion.models.pipelines import Whole, adapters, brought
from rlfusion.models.pipelines.model import _cached

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
SIDE = 16
LAYOUTS = ("peft", "diffusers", "kohya")


@pytest.fixture(scope="module")
def sd(tiny_pipelines) -> Callable[[], diffusers.StableDiffusionPipeline]:
    return lambda: diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd"])


@pytest.fixture(scope="module")
def held(sd) -> lora_files.Factors:
    return factors(sd().unet)


@pytest.fixture(scope="module")
def texts(sd) -> lora_files.Factors:
    return factors(sd().text_encoder, ("q_proj", "k_proj", "v_proj", "out_proj"))


@pytest.fixture(scope="module")
def files(sd, held, texts, tmp_path_factory) -> dict[str, Path]:
    """The same adapters in each layout, and ``both``, with others of the text encoder, of which kohya's names have a
    part more than transformers' own.
    """
    root = tmp_path_factory.mktemp("loras")
    return {
        "peft": by_peft(sd().unet, held, root / "peft"),
        "diffusers": by_diffusers(sd().unet, held, root / "diffusers"),
        "kohya": by_kohya({"lora_unet": held}, root / "kohya.safetensors"),
        "both": by_kohya({"lora_unet": held, "lora_te_text_model": texts}, root / "both.safetensors"),
    }


def of(text: str) -> list[dict]:
    return [one._asdict() for one in adapters.parse(text)]


def walk(denoiser, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Our latents of the two prompts, and their noise."""
    z = torch.randn(2, steps + 1, *denoiser.space.latent((3, SIDE, SIDE)), generator=torch.Generator().manual_seed(1))
    chain = Chain(steps=steps, spacing="model", kernel=denoiser.own.sampling.kernel, guidance_scale=3.0)
    return sample(chain.policy(denoiser, PROMPTS), z, chain.times(denoiser), torch.arange(2)), z


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_merged_as_its_own_strength_says(layout, scale, files, held, sd, tiny_pipelines, caplog):
    by_hand = sd()
    merge(by_hand.unet, held, scale)
    notices._said.clear()
    denoiser = pipelines.build(about(tiny_pipelines["sd"], adapters=of(f"{files[layout]}:{scale}")), PROMPTS)
    expected = by_hand.unet.state_dict()
    assert denoiser.net.model.state_dict().keys() == expected.keys()
    for name, tensor in denoiser.net.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)
    assert f"times {scale:g}: {len(held)} of {len(held)} layers matched in the unet\n" in caplog.text


def test_several_are_merged_one_after_the_other_and_sampled_as_by_diffusers(files, held, sd, tiny_pipelines):
    told = about(tiny_pipelines["sd"], adapters=of(f"{files['peft']}:0.5, {files['kohya']}:0.25"))
    ours, z = walk(pipelines.build(told, PROMPTS))
    agree(ours, Whole(told).latents(PROMPTS, [0, 1], z, guidance_scale=3.0))
    by_hand = sd()
    merge(by_hand.unet, held, 0.75)
    by_hand.set_progress_bar_config(disable=True)
    agree(
        ours,
        by_hand(
            PROMPTS, negative_prompt=told["negatives"], height=SIDE, width=SIDE, num_inference_steps=3,
            guidance_scale=3.0, latents=z[:, 0].clone(), output_type="latent",
        ).images,
    )  # fmt: skip


def test_adapters_of_text_encoders_change_the_embeddings_and_their_cache(
    files, held, texts, sd, tiny_pipelines, tmp_path
):
    by_hand = sd()
    merge(by_hand.text_encoder, texts, 0.5)
    told = about(tiny_pipelines["sd"], adapters=of(f"{files['both']}:0.5"), cache=str(tmp_path))
    path, family = tiny_pipelines["sd"], pipelines.family_of(tiny_pipelines["sd"])
    for _ in range(2):  # encoded, and from the cache
        denoiser = pipelines.build(told, PROMPTS)
        found = denoiser.net.conditions(torch.tensor([0, 1]), torch.float32)["text"]
        for row, prompt in zip(found, PROMPTS):
            torch.testing.assert_close(
                row[None], by_hand.encode_prompt(prompt, "cpu", 1, False)[0], rtol=1e-5, atol=1e-6
            )
    plain, network_alone = (told | {"adapters": of(str(text))} for text in ("", files["kohya"]))
    places = [_cached(path, family, one, PROMPTS) for one in (told, plain, network_alone)]
    assert places[0] != places[1] == places[2]
    ours, z = walk(denoiser)
    agree(ours, Whole(told).latents(PROMPTS, [0, 1], z, guidance_scale=3.0))


def test_what_is_not_matched_is_said_and_nothing_at_all_is_refused(held, sd, tiny_pipelines, tmp_path, caplog):
    layer, *_others = held
    stranger = {f"{layer}.elsewhere": held[layer]}
    folder = tmp_path / "some"
    by_diffusers(sd().unet, held, folder)
    file = folder / pipelines.LORA
    tensors = safetensors.torch.load_file(file)
    more = {f"unet.{name}.lora_{ab}.weight": t for name, pair in stranger.items() for ab, t in zip("AB", pair)}
    safetensors.torch.save_file({**tensors, **{n: t.contiguous() for n, t in more.items()}}, file)
    notices._said.clear()
    pipelines.build(about(tiny_pipelines["sd"], adapters=of(str(file))), PROMPTS)
    assert f"{len(held)} of {len(held) + 1} layers matched in the unet; it has no {layer}.elsewhere" in caplog.text
    safetensors.torch.save_file({n: t.contiguous() for n, t in more.items()}, file)
    with pytest.raises(ConfigError, match=r"cannot be loaded into StableDiffusionPipeline|none of their layers"):
        pipelines.build(about(tiny_pipelines["sd"], adapters=of(str(file))), PROMPTS)


A, B = torch.randn(2, 4), torch.randn(4, 2)
LOW = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B}
STRANGE: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "dora": ({**LOW, "unet.x.lora_magnitude_vector": A}, "1 of its tensors are no part of a LoRA .unet.x.lora_magn"),
    "kohya's dora": ({**LOW, "lora_unet_x.dora_scale": A}, "no DoRA"),
    "loha": ({**LOW, "lora_unet_x.hada_w1_a": A}, "no DoRA, LoHa"),
    "locon's middle": ({**LOW, "lora_unet_x.lora_mid.weight": A}, "lora_mid"),
    "whole layers": ({**LOW, "unet.conv_in.weight": A}, "unet.conv_in.weight"),
    "a model": ({"conv_in.weight": A}, "holds no adapters"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_would_be_left_out_is_refused_by_name(name, tmp_path):
    tensors, said = STRANGE[name]
    held = {key: tensor.clone() for key, tensor in tensors.items()}
    safetensors.torch.save_file(held, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=said):
        adapters.parse(str(tmp_path / "a.safetensors"))


def test_files_and_strengths_that_are_none_are_refused(files, tiny_pipelines, tmp_path):
    (tmp_path / "damaged.safetensors").write_bytes(b"\x08\x00\x00")
    (tmp_path / "pickled.bin").write_bytes(b"\x80\x04")
    for text, said in {
        "nowhere.safetensors": "there is no nowhere.safetensors",
        f"{tmp_path}/damaged.safetensors": "cannot be read",
        f"{tmp_path}/pickled.bin": "only .safetensors are read",
        str(tmp_path): f"there is no {pipelines.LORA}",
        f"{files['kohya']}:much": "expected FILE:STRENGTH, a finite number, not 0",
        f"{files['kohya']}:0": "not 0",
        f"{files['kohya']}:nan": "a finite number",
    }.items():
        with pytest.raises(ConfigError, match=said):
            adapters.parse(text)
    alone = shutil.copy(files["peft"], tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"in peft's layout, and adapter_config\.json beside them"):
        pipelines.build(about(tiny_pipelines["sd"], adapters=of(str(alone))), PROMPTS)


def test_adapters_of_another_model_are_refused_in_one_line(files, tiny_pipelines):
    for name in ("sdxl", "flux"):
        told = about(tiny_pipelines[name], adapters=of(str(files["diffusers"])))
        with pytest.raises(ConfigError, match=r"adapters .*(cannot be loaded into|none of their layers)") as caught:
            pipelines.build(told, PROMPTS)
        assert "\n" not in str(caught.value)


def test_adapters_of_a_transformer_are_merged(tiny_pipelines, tmp_path):
    def flux():
        return diffusers.FluxPipeline.from_pretrained(tiny_pipelines["flux"])

    held, by_hand = factors(flux().transformer), flux()
    file = by_diffusers(flux().transformer, held, tmp_path, diffusers.FluxPipeline)
    merge(by_hand.transformer, held)
    denoiser = pipelines.build(about(tiny_pipelines["flux"], adapters=of(str(file))), PROMPTS)
    for name, tensor in denoiser.net.model.state_dict().items():
        torch.testing.assert_close(tensor, by_hand.transformer.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_trained_on_exported_and_read_back_by_diffusers(
    layout, files, held, sd, tiny_pipelines, tmp_path
):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = settings(tiny_pipelines["sd"], "draft", tmp_path, lora=str(files[layout]), updates=1)
    config = recorded(replace(config, rollout=Rollout(prompts=2, samples_per_prompt=4, item=8)))
    assert "sha256" in config.lora
    result = ran(config, "run")
    assert result["after"]["reward"] != result["before"]["reward"]
    by_hand = sd()
    merge(by_hand.unet, held)
    card = models.describe(str(tiny_pipelines["sd"]), config.pipeline)
    begun = models.build(card)
    models.adapt(begun, card, config.lora)
    trained = {name: p for name, p in begun.named_parameters() if p.requires_grad}
    assert all(ADAPTER in name and p.dtype == torch.float32 for name, p in trained.items())
    assert {p.shape[0 if "lora_A" in name else 1] for name, p in trained.items()} == {RANK}
    start, z = walk(begun)
    mine = pipelines.build(about(tiny_pipelines["sd"], adapters=of(str(files[layout])), negatives=["", ""]), PROMPTS)
    agree(start, walk(mine)[0])

    saved = models.build(models.describe(str(tmp_path / "run"), pipelines.Settings()))
    pipe = sd()
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(tmp_path / "run" / "model")
    assert pipe.unet.peft_config["default_0"].lora_alpha == ALPHA
    ours, z = walk(saved)
    theirs = pipe(
        PROMPTS, height=SIDE, width=SIDE, num_inference_steps=3, guidance_scale=3.0, latents=z[:, 0].clone(),
        output_type="latent",
    ).images  # fmt: skip
    agree(ours, theirs)
    assert (ours - start).abs().max() > 1e-3, "training moved them"


def test_adapters_of_text_encoders_are_not_trained_on(files, tiny_pipelines):
    card = models.describe(str(tiny_pipelines["sd"]), pipelines.Settings(prompts="a red cat"))
    with pytest.raises(ConfigError, match="it adapts text encoders as well, which are not trained"):
        models.adapt(models.build(card), card, str(files["both"]))


@pytest.mark.parametrize("more", ["rank=4", "alpha=2.0", "targets='to_q'"])
def test_a_file_has_its_own_rank_and_targets(more, files):
    with pytest.raises(ConfigError, match="the file's rank, alpha and targets: expected none beside it"):
        models.lora.parse(f"LoRA(file='{files['kohya']}', {more})")


def test_files_that_were_exchanged_are_refused(files, tiny_pipelines, tmp_path):
    file = shutil.copy(files["kohya"], tmp_path / "a.safetensors")
    config = settings(tiny_pipelines["sd"], "draft", tmp_path, lora=str(file))
    config = replace(config, pipeline=replace(config.pipeline, prompts="a red cat", adapters=f"{file}:0.5"))
    kept = recorded(config)
    assert kept.pipeline.adapters == f"{file}:0.5"
    assert kept.pipeline.merged() == of(f"{file}:0.5")
    told = about(tiny_pipelines["sd"], adapters=kept.pipeline.merged())
    shutil.copy(files["both"], file)
    with pytest.raises(ConfigError, match="others than the run began with"):
        kept.pipeline.merged()
    with pytest.raises(ConfigError, match=r"gone, or others .*: put them back"):
        pipelines.build(told, PROMPTS)
    card = models.describe(str(tiny_pipelines["sd"]), pipelines.Settings(prompts="a red cat"))
    with pytest.raises(ConfigError, match=r"gone, or others .*: put them back"):
        models.adapt(models.build(card), card, kept.lora)


def test_whole_weights_trained_on_merged_adapters_are_exported_with_the_text_encoder_and_the_scheduler(
    files, texts, sd, tiny_pipelines, tmp_path
):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    config = settings(tiny_pipelines["sd"], "draft", tmp_path, updates=1)
    config = replace(config, rollout=Rollout(prompts=2, samples_per_prompt=4, item=8))
    own = replace(config.pipeline, adapters=str(files["both"]), scheduler="LCMScheduler")
    ran(recorded(replace(config, pipeline=own, chain=Chain(steps=2, spacing="model", kernel="Renoise()"))), "run")
    made, by_hand = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "run" / "model"), sd()
    merge(by_hand.text_encoder, texts)
    assert type(made.scheduler).__name__ == "LCMScheduler"
    for name, tensor in made.text_encoder.state_dict().items():
        torch.testing.assert_close(tensor, by_hand.text_encoder.state_dict()[name], rtol=1e-5, atol=1e-6)
    again = json.loads((tmp_path / "run" / "model" / "model.json").read_text())["pipeline"]
    assert again["adapters"] == []
    assert "scheduler" not in again


BROUGHT = {
    "lcm-lora-sdv1-5.safetensors": ("LCMScheduler", 4),
    "Hyper-SD15-2steps-lora.safetensors": ("DDIMScheduler", 2),
    "sdxl_lightning_8step_lora.safetensors": ("EulerDiscreteScheduler", 8),
    "sd_xl_turbo_lora_v1.safetensors": ("EulerAncestralDiscreteScheduler", 4),
    "TCD-SD15-LoRA.safetensors": ("TCDScheduler", 4),
    "models--latent-consistency--lcm-lora-sdv1-5/snapshots/abc/pytorch_lora_weights.safetensors": ("LCMScheduler", 4),
    "turbocharged.safetensors": ("", 0),
    "calcmania.safetensors": ("", 0),
}


@pytest.mark.parametrize(
    ("name", "how"), [*((name, "--adapters") for name in BROUGHT), (next(iter(BROUGHT)), "--lora")]
)
def test_adapters_for_few_steps_bring_their_scheduler(name, how, files, tiny_pipelines, tmp_path):
    scheduler, steps = BROUGHT[name]
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(files["kohya"], file)
    told = ["--model", str(tiny_pipelines["sd"]), "--pipeline.prompts", "a red cat", how, str(file)]
    config = settings_of("finetune", told)
    assert config.pipeline.scheduler.partition("(")[0] == scheduler
    assert config.chain.steps == (steps or 20)
    assert config.chain.guidance_scale == (1.0 if steps else 7.5)
    assert config.chain.kernel == ("Renoise()" if scheduler == "LCMScheduler" else "DDIM(eta=1.0)")
    made = pipelines.outline(models.describe(str(tiny_pipelines["sd"]), config.pipeline).pipeline)
    assert len(config.chain.times(made)) == config.chain.steps + 1
    own = settings_of("finetune", [*told, "--pipeline.scheduler", "own"])
    assert own.chain.steps == 20
    assert not models.describe(str(tiny_pipelines["sd"]), own.pipeline).pipeline.get("scheduler")


def test_a_flow_keeps_its_scheduler_and_takes_the_steps(files, tiny_pipelines, tmp_path):
    file = shutil.copy(files["kohya"], tmp_path / "Hyper-FLUX.1-dev-8steps-lora.safetensors")
    config = settings_of("finetune", ["--model", str(tiny_pipelines["flux"]), "--adapters", str(file)])
    assert (config.pipeline.scheduler, config.chain.steps, config.chain.guidance_scale) == ("", 8, 3.5)


def test_the_scheduler_of_lcm_is_sampled_as_by_diffusers(files, tiny_pipelines, tmp_path):
    file = shutil.copy(files["kohya"], tmp_path / "lcm.safetensors")
    told = pipelines.Settings(prompts="a red cat", adapters=str(file), size=SIDE)
    card = models.describe(str(tiny_pipelines["sd"]), told).pipeline | {"negatives": ["", ""]}
    ours, z = walk(pipelines.build(card, PROMPTS))
    agree(ours, Whole(card).latents(PROMPTS, [0, 1], z, guidance_scale=3.0))


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        ("LCMSchedular", "did you mean 'LCMScheduler'"),
        ("StableDiffusionPipeline", "pipeline.scheduler"),
        ("HeunDiscreteScheduler", "is not read"),
        ("EulerDiscreteScheduler(timestep_spacng='trailing')", "did you mean 'timestep_spacing'"),
        ("EulerDiscreteScheduler(steps_offset='x')", "steps_offset"),
    ],
)
def test_a_scheduler_that_is_none_is_refused(scheduler, said, tiny_pipelines):
    with pytest.raises(ConfigError, match=said):
        pipelines.build(about(tiny_pipelines["sd"], scheduler=scheduler), PROMPTS)


def test_a_lora_given_as_the_model_is_answered_with_what_to_type(files, capsys, tmp_path):
    for place in (files["kohya"], files["peft"], files["peft"].parent, files["diffusers"].parent):
        for command in (["finetune", "--model"], ["sample", "--checkpoint"], ["check-model"]):
            capsys.readouterr()
            assert main([*command, str(place)]) == 2
            err = capsys.readouterr().err
            assert "holds adapters (LoRA) and no model: expected the pipeline" in err
            assert f"--adapters {place} (merged) or --lora {place} (trained on)" in err
            assert err.count("\n") == 1
    safetensors.torch.save_file({"conv_in.weight": A}, tmp_path / "checkpoint.safetensors")
    assert main(["finetune", "--model", str(tmp_path / "checkpoint.safetensors")]) == 2
    assert "is a file of weights: expected a diffusers folder" in capsys.readouterr().err


def test_files_of_adapters_travel_with_a_launched_job(files, tmp_path):
    inputs = Inputs(Path("/far"), ())
    there = inputs.translated({
        "pipeline": {"adapters": f"{files['kohya']}:0.5"}, "lora": str(files["peft"])
    })  # fmt: skip
    place, _, scale = there["pipeline"]["adapters"].rpartition(":")
    assert place.startswith("/far/cache/inputs/")
    assert place.endswith("kohya.safetensors")
    assert scale == "0.5"
    settings_there = models.lora.parse(there["lora"])
    assert settings_there.file.startswith("/far/cache/inputs/")
    assert settings_there.sha256
    assert {Path(name).name for name in inputs.files} >= {"kohya.safetensors", "adapter_config.json"}
    assert brought.named("kohya.safetensors") is None
