"""Stable Diffusion learns from a CLIP, by LoRA: a pipeline of diffusers, and two commands.

python examples/sd_lora_clip.py [FOLDER]

Without weights at hand it makes a tiny pipeline of random weights, of the same classes as Stable Diffusion's, and a
tiny CLIP of four colours, so that all of it takes a minute of CPU. With the real ones it is one command:

rlfusion finetune --model stable-diffusion-v1-5/stable-diffusion-v1-5 --pipeline.prompts prompts.txt \
    --pipeline.dtype bfloat16 --lora "LoRA(rank=8)" --reward clip_score \
    --reward_options '{clip_score: {model: hf-hub:laion/CLIP-ViT-B-32-laion2B-s34B-b79K}}'

What comes out loads with ``pipe.load_lora_weights("FOLDER/tuned/model")``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from rlfusion.cli.main import main as rlfusion

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 70, 220), "yellow": (240, 220, 50)}
PROMPTS = [f"something {word}" for word in COLOURS]
SIDE = 16


def pictures(path: Path, each: int = 60) -> None:
    """An .npz of pictures with captions: each colour, lighter, darker and with noise."""
    draw, images, captions = np.random.default_rng(0), [], []
    for prompt, colour in zip(PROMPTS, COLOURS.values()):
        for _ in range(each):
            noise = draw.normal(0, 25, (SIDE, SIDE, 3)) + draw.normal(0, 25)
            images.append(np.clip(np.asarray(colour) * draw.uniform(0.6, 1.1) + noise, 0, 255).astype(np.uint8))
            captions.append(prompt)
    np.savez(path, images=np.stack(images), captions=np.array(captions))


def tiny_stable_diffusion() -> Any:
    """A ``StableDiffusionPipeline`` of random weights, whose words are spelled letter by letter."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    text = CLIPTextConfig(
        **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "projection_dim": 16},
        **{
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "bos_token_id": 52,
            "eos_token_id": 53,
            "pad_token_id": 53,
        },
    )
    blocks = {"norm_num_groups": 4, "layers_per_block": 1}
    unet = UNet2DConditionModel(
        **{"sample_size": SIDE // 2, "block_out_channels": (8, 16), "cross_attention_dim": 16, "attention_head_dim": 4},
        **{"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), **blocks},
    )
    vae = AutoencoderKL(
        **{"block_out_channels": (8, 8), "latent_channels": 4, "sample_size": SIDE, **blocks},
        **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
    )
    return StableDiffusionPipeline(
        **{"unet": unet, "vae": vae, "text_encoder": CLIPTextModel(text)},
        **{"tokenizer": CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)},
        **{
            "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
            "safety_checker": None,
            "feature_extractor": None,
        },
    )


def commands(root: Path) -> list[list[str]]:
    """The words of the two commands."""
    clip = {"clip_score": {"model": str(root / "clip")}}
    return [
        [
            *("train-clip", "--root", str(root), "--name", "clip", "--data", str(root / "colours.npz")),
            *("--steps", "40"),
        ],
        [
            *("finetune", "--root", str(root), "--name", "tuned", "--model", str(root / "pipeline")),
            *("--pipeline.prompts", str(root / "prompts.txt"), "--pipeline.size", str(SIDE)),
            *("--lora", "LoRA(rank=4, alpha=8)", "--reward", "clip_score", "--reward_options", json.dumps(clip)),
            *("--chain.steps", "3", "--chain.guidance_scale", "2", "--agent", "draft", "--agent.lr", "1e-2"),
            *("--rollout.prompts", "1", "--rollout.samples_per_prompt", "16", "--rollout.item", "16", "--updates", "5"),
            *("--evaluation.samples", "50", "--monitor.every", "0"),
        ],
    ]


def main(root: Path) -> tuple[float, float]:
    """Make the parts, run the commands; the CLIP's score before and after."""
    root.mkdir(parents=True, exist_ok=True)
    pictures(root / "colours.npz")
    (root / "prompts.txt").write_text(PROMPTS[0])
    tiny_stable_diffusion().save_pretrained(root / "pipeline")
    for words in commands(root):
        print("rlfusion", *words)
        if code := rlfusion(words):
            raise SystemExit(code)
    told = json.loads((root / "tuned" / "summary.json").read_text())
    return told["before"]["reward"], told["after"]["reward"]


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"))
