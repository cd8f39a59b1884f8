"""Tiny random weights for a kit of rewards, made in the kit's own environment by the packages that it has.

    ENVIRONMENT/bin/python benchmarks/kits_tiny.py KIT FOLDER    prints {"options": ..., "environment": ...} as JSON

``image_reward`` and ``hpsv3`` ask the hub for files of other models, which lie in a cache of ours then. Of ``deqa``
even the code is of the weights' repository: here it is a stand-in, with the published signature.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<|vision_pad|>"]
TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
Made = dict[str, dict[str, Any]]


def safety(folder: Path) -> Made:
    """A ViT of one small layer, random, with the classes normal and nsfw."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    config = ViTConfig(**size, patch_size=8, intermediate_size=16, id2label={0: "normal", 1: "nsfw"})
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return {"options": {"model": str(folder)}, "environment": {}}


def object_checks(folder: Path) -> Made:
    """A tiny Mask2Former and a random CLIP for the colours."""
    import open_clip
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    stages = [f"stage{i}" for i in range(1, 5)]
    seen = SwinConfig(
        image_size=64, embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=2, out_features=stages
    )
    small = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim"), 32)
    small |= {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2}
    config = Mask2FormerConfig(backbone_config=seen, num_attention_heads=2, num_queries=6, **small)
    config.id2label = {0: "bench", 1: "dog", 2: "cat"}
    config.label2id = {name: i for i, name in config.id2label.items()}
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    torch.save(open_clip.create_model("RN50").state_dict(), folder / "clip.pt")
    told = {"model": str(folder), "clip": "RN50", "clip_weights": str(folder / "clip.pt"), "strict": False}
    return {"options": told, "environment": {}}


def lpips_likeness(folder: Path) -> Made:
    """A random AlexNet below the package's own linear weights, and a picture to be like."""
    from PIL import Image
    from torchvision.models import alexnet

    torch.save(alexnet().state_dict(), folder / "alexnet.pth")
    Image.new("RGB", (64, 64), (200, 120, 40)).save(folder / "reference.png")
    told = {"reference": str(folder / "reference.png"), "weights": str(folder / "alexnet.pth")}
    return {"options": told, "environment": {}}


def in_hub(folder: Path, name: str) -> Path:
    """The folder of a model of the hub's in the cache below ``folder``."""
    at = folder / "hub" / f"models--{name.replace('/', '--')}"
    (at / "refs").mkdir(parents=True)
    (at / "refs" / "main").write_text("0" * 40)
    (at / "snapshots" / ("0" * 40)).mkdir(parents=True)
    return at / "snapshots" / ("0" * 40)


def image_reward(folder: Path) -> Made:
    """The network in its own size, which the package does not let one choose, but for the text's; random."""
    letters = [chr(c) for c in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    held = in_hub(folder, "bert-base-uncased")
    (held / "vocab.txt").write_text("\n".join(words))
    (held / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    cache = folder / ".cache" / "ImageReward"
    cache.mkdir(parents=True)
    size = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 1, "intermediate_size": 64}
    more = {"vocab_size": 30524, "add_cross_attention": True, "encoder_width": 1024, "hidden_act": "gelu"}
    more |= {"layer_norm_eps": 1e-12, "type_vocab_size": 2, "model_type": "bert", "max_position_embeddings": 512}
    (cache / "med_config.json").write_text(json.dumps(size | more))
    torch.save({"mlp.layers.7.bias": torch.ones(1)}, folder / "ImageReward.pt")
    return {
        "options": {"model": str(folder / "ImageReward.pt")},
        "environment": {"HOME": str(folder), "HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
    }


def tokens(folder: Path, more: list[str]) -> Any:
    """Bytes, what Qwen marks, and ``more``."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast

    alphabet = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = Qwen2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=4096)
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    made.add_tokens(more)
    made.chat_template = TEMPLATE
    return made


def _sized(tokenizer: Any) -> dict[str, Any]:
    named = {"vision_start_token_id": SPECIAL[3], "vision_end_token_id": SPECIAL[4], "vision_token_id": SPECIAL[7]}
    named |= {"image_token_id": SPECIAL[5], "video_token_id": SPECIAL[6]}
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    size |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}, "max_position_embeddings": 4096}
    return size | {key: tokenizer.convert_tokens_to_ids(word) for key, word in named.items()}


def unified_reward(folder: Path) -> Made:
    """One that answers with a score of 2 or of 4, as its first hidden number is above 0 or below."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )

    answers = ["Final Score: 2", "Final Score: 4"]
    tokenizer = tokens(folder, answers)
    sight = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(**_sized(tokenizer), vision_config=sight | {"fullatt_block_indexes": [1]})
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.lm_head.weight.data.zero_()
    for word, sign in zip(answers, (1, -1)):
        model.lm_head.weight.data[tokenizer.convert_tokens_to_ids(word), 0] = sign
    model.save_pretrained(folder)
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56)
    Qwen2_5_VLProcessor(images, tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return {"options": {"model": str(folder), "most_words": 1}, "environment": {}}


def _whole(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def hpsv3(folder: Path) -> Made:
    """A tiny Qwen2-VL as the reward model of the package, random."""
    from hpsv3.model.qwen2vl_trainer import Qwen2VLRewardModelBT
    from safetensors.torch import save_file
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor, Qwen2VLProcessor

    held = in_hub(folder, "Qwen/Qwen2-VL-7B-Instruct")
    tokenizer = tokens(held, [])
    sight = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    config = Qwen2VLConfig(**_sized(tokenizer), vision_config=sight)
    config.save_pretrained(held)
    weights = _whole(Qwen2VLForConditionalGeneration(config))  # save_pretrained imports deepspeed, which wants a GPU
    save_file(weights, held / "model.safetensors", {"format": "pt"})
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, chat_template=TEMPLATE).save_pretrained(held)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    how = {"output_dim": 2, "reward_token": "special", "rm_head_type": "ranknet"}
    model = Qwen2VLRewardModelBT.from_pretrained(str(held), **how)
    model.resize_token_embeddings(len(tokenizer))
    save_file(_whole(model), folder / "HPSv3.safetensors")
    return {
        "options": {"checkpoint": str(folder / "HPSv3.safetensors"), "batch": 4},
        "environment": {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"},
    }


DEQA = """
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from transformers import PretrainedConfig, PreTrainedModel


class Config(PretrainedConfig):
    model_type = "tiny_deqa"


class Model(PreTrainedModel):
    config_class = Config
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 5)
        self.post_init()

    def _init_weights(self, module):
        pass

    @torch.inference_mode()
    def score(self, images, task_: str = "quality", input_: str = "image"):
        means = torch.stack([to_tensor(image).mean((1, 2)) for image in images]).to(self.layer.weight)
        return self.layer(means).softmax(-1) @ torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]).to(means)
"""


def deqa(folder: Path) -> Made:
    """A network with the weights repository's ``score(images)``, in place of its code."""
    from safetensors.torch import save_file

    (folder / "modeling.py").write_text(DEQA)
    places = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    config = {"model_type": "tiny_deqa", "architectures": ["Model"], "auto_map": places}
    (folder / "config.json").write_text(json.dumps(config))
    layer = {"layer.weight": torch.randn(5, 3), "layer.bias": torch.randn(5)}
    save_file(layer, folder / "model.safetensors", metadata={"format": "pt"})
    return {"options": {"model": str(folder)}, "environment": {"HF_HOME": str(folder)}}


_ALL = (image_reward, hpsv3, unified_reward, deqa, object_checks, lpips_likeness, safety)
MAKERS = {made.__name__: made for made in _ALL}

if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(MAKERS[sys.argv[1]](Path(sys.argv[2]))))
