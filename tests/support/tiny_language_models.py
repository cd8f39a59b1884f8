"""Tiny random pipelines whose texts a large language model reads: Qwen 3, Qwen2.5-VL, Mistral 3, all of bytes."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

BYTES = sorted(ByteLevel.alphabet())


def byte_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, and a conversation of one turn."""
    words = [*BYTES, "<|endoftext|>"]
    tokenizer = Qwen2Tokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=512)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}:{% endfor %}"
    return tokenizer


def qwen_3(make, layers: int) -> tuple[torch.nn.Module, Qwen2Tokenizer]:
    config = Qwen3Config(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    return make(config).eval(), byte_tokenizer()


def _flux_2(guidance: bool) -> dict:
    """The parts that FLUX.2 dev and Klein share."""
    network = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=16, mlp_ratio=2.0, axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    ).eval()  # fmt: skip
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, layers_per_block=1,
    ).eval()  # fmt: skip
    autoencoder.bn.running_mean.normal_()
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return {"vae": autoencoder, "transformer": network}


def flux_2_klein(scheduler=None, distilled: bool = False) -> Flux2KleinPipeline:
    encoder, tokenizer = qwen_3(Qwen3ForCausalLM, 27)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"text_encoder": encoder, "tokenizer": tokenizer, "is_distilled": distilled}
    return Flux2KleinPipeline(scheduler, **_flux_2(guidance=False), **parts)


def mistral_3(layers: int) -> tuple[torch.nn.Module, PixtralProcessor]:
    """Bytes as tokens, what the user says alone of a conversation, and a processor of images that see none."""
    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<pad>"]
    inner = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate([*BYTES, *marks])}, merges=[]))
    inner.pre_tokenizer, inner.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'][0]['text'] }}:{% endif %}{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", additional_special_tokens=marks[:3], model_max_length=512,
        padding_side="left",
    )  # fmt: skip
    images = PixtralImageProcessor(patch_size={"height": 4, "width": 4}, size={"longest_edge": 16})
    text = {
        "model_type": "mistral", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    sight = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
    }  # fmt: skip
    config = Mistral3Config(text_config=text, vision_config=sight, image_token_index=len(BYTES))
    processor = PixtralProcessor(images, tokenizer, patch_size=4, chat_template=template)
    return Mistral3ForConditionalGeneration(config).eval(), processor


def flux_2_dev(scheduler=None) -> Flux2Pipeline:
    encoder, processor = mistral_3(31)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return Flux2Pipeline(scheduler, **_flux_2(guidance=True), text_encoder=encoder, tokenizer=processor)


def qwen_2_5() -> torch.nn.Module:
    """A reader of bytes that could see images too."""
    text = {
        "vocab_size": 260, "bos_token_id": None, "eos_token_id": None, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=sight)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def qwen_image(scheduler=None) -> QwenImagePipeline:
    network = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    autoencoder = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[1.5, 0.7, 1.2, 0.9],
    ).eval()  # fmt: skip
    shifted = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64, "shift_terminal": 0.02}
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(**shifted)
    return QwenImagePipeline(scheduler, autoencoder, qwen_2_5(), byte_tokenizer(), network)
