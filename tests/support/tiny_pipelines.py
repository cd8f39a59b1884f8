"""Tiny random pipelines of each family, made offline from configurations and hand-made vocabularies, in float32."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_language_models import flux_2_dev, flux_2_klein, qwen_3, qwen_image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-' "
ABSENT = {"safety_checker": None, "feature_extractor": None}
SCALED = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""Stable Diffusion's table."""

SD15 = {**SCALED, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
"""The scheduler of Stable Diffusion 1.5, as it is published."""


def clip_tokenizer() -> CLIPTokenizer:
    """Letters as tokens."""
    letters = [c for c in LETTERS if c != " "]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def clip_encoder(projected: bool = False) -> torch.nn.Module:
    config = CLIPTextConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=80, eos_token_id=81, pad_token_id=81,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def t5(width: int = 16) -> tuple[torch.nn.Module, T5TokenizerFast]:
    vocab = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -5.0),
        ("\u2581", -2.0),
        *((c, -3.0) for c in LETTERS if c != " "),
    ]
    tokenizer = T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)
    config = T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def gemma() -> tuple[torch.nn.Module, GemmaTokenizer]:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *(c for c in LETTERS if c != " ")]
    tokenizer = GemmaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
    )  # fmt: skip
    return Gemma2Model(config).eval(), tokenizer


def vae(channels: int = 4, blocks: int = 2, **settings) -> AutoencoderKL:
    """Halves the sides between two blocks."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * blocks, latent_channels=channels, norm_num_groups=4, sample_size=16, **settings,
    ).eval()  # fmt: skip


def unet(**settings) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **{"cross_attention_dim": 16, **settings},
    ).eval()  # fmt: skip


def stable_diffusion(scheduler=None, **settings) -> StableDiffusionPipeline:
    parts = {"text_encoder": clip_encoder(), "tokenizer": clip_tokenizer(), "unet": unet(**settings), "vae": vae()}
    return StableDiffusionPipeline(**parts, scheduler=scheduler or DDIMScheduler(**SD15), **ABSENT)


def latent_consistency(scheduler=None) -> LatentConsistencyModelPipeline:
    parts = {"text_encoder": clip_encoder(), "tokenizer": clip_tokenizer(), "vae": vae()}
    scheduler = scheduler or LCMScheduler()
    return LatentConsistencyModelPipeline(**parts, unet=unet(time_cond_proj_dim=8), scheduler=scheduler, **ABSENT)


def stable_diffusion_xl(scheduler=None, **settings) -> StableDiffusionXLPipeline:
    network = unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16, **settings,
    )  # fmt: skip
    encoders = {"text_encoder": clip_encoder(), "text_encoder_2": clip_encoder(projected=True)}
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    scheduler = scheduler or DDIMScheduler(**SD15)
    return StableDiffusionXLPipeline(**encoders, **tokenizers, unet=network, vae=vae(), scheduler=scheduler)


def stable_diffusion_3(scheduler=None, with_t5: bool = True) -> StableDiffusion3Pipeline:
    network = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip
    encoders = {"text_encoder": clip_encoder(True), "text_encoder_2": clip_encoder(True)}
    third, tokenizer_3 = t5(32) if with_t5 else (None, None)
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": tokenizer_3}
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(
        transformer=network, **encoders, text_encoder_3=third, **tokenizers, scheduler=scheduler,
        vae=vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


def flux(scheduler=None, guidance: bool = True) -> FluxPipeline:
    network = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=guidance,
    ).eval()  # fmt: skip
    second, tokenizer_2 = t5()
    shifted = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
    return FluxPipeline(
        transformer=network, text_encoder=clip_encoder(), tokenizer=clip_tokenizer(), text_encoder_2=second,
        tokenizer_2=tokenizer_2, vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(**shifted),
    )  # fmt: skip


def _sana(make, scheduler, **settings):
    network = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=16, **settings,
    ).eval()  # fmt: skip
    autoencoder = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock",) * 2,
        decoder_block_types=("ResBlock",) * 2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1], downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu", scaling_factor=0.4,
    ).eval()  # fmt: skip
    encoder, tokenizer = gemma()
    return make(tokenizer=tokenizer, text_encoder=encoder, vae=autoencoder, transformer=network, scheduler=scheduler)


def sana(scheduler=None) -> SanaPipeline:
    return _sana(SanaPipeline, scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0))


def sana_sprint(scheduler=None) -> SanaSprintPipeline:
    return _sana(SanaSprintPipeline, scheduler or SCMScheduler(), guidance_embeds=True)


def chroma(scheduler=None) -> ChromaPipeline:
    network = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()  # fmt: skip
    encoder, tokenizer = t5()
    return ChromaPipeline(
        transformer=network, text_encoder=encoder, tokenizer=tokenizer,
        vae=vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=1.5),
    )  # fmt: skip


def aura_flow(scheduler=None) -> AuraFlowPipeline:
    network = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=64,
    ).eval()  # fmt: skip
    encoder, tokenizer = t5()
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(tokenizer, encoder, vae(), network, scheduler)


def lumina_2(scheduler=None) -> Lumina2Pipeline:
    network = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(300, 16, 16),
        cap_feat_dim=16,
    ).eval()  # fmt: skip
    encoder, tokenizer = gemma()
    autoencoder = vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=6.0)
    return Lumina2Pipeline(network, scheduler, autoencoder, encoder, tokenizer)


def bert() -> tuple[torch.nn.Module, BertTokenizer]:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(c for c in LETTERS if c != " ")]
    words += [f"##{c}" for c in LETTERS if c.isalnum()]
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=77)
    config = BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128,
    )  # fmt: skip
    return BertModel(config).eval(), tokenizer


def hunyuan_dit(scheduler=None) -> HunyuanDiTPipeline:
    """With an autoencoder that reduces the sides to an eighth, which the pipeline takes for granted."""
    network = HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, activation_fn="gelu-approximate",
        sample_size=8, hidden_size=16, num_layers=2, mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16,
        pooled_projection_dim=16,
    ).eval()  # fmt: skip
    (encoder, tokenizer), (second, tokenizer_2) = bert(), t5()
    settings = {**SCALED, "beta_end": 0.018, "clip_sample": False, "prediction_type": "v_prediction"}
    return HunyuanDiTPipeline(
        vae(blocks=4),
        encoder,
        tokenizer,
        network,
        scheduler or DDPMScheduler(**settings),
        None,
        None,
        False,
        second,
        tokenizer_2,
    )


def z_image(scheduler=None) -> ZImagePipeline:
    network = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    encoder, tokenizer = qwen_3(Qwen3Model, 2)
    autoencoder = vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0)
    with torch.no_grad():  # which are made empty
        for name in ("x_pad_token", "cap_pad_token"):
            getattr(network, name).normal_()
    return ZImagePipeline(scheduler, autoencoder, encoder, tokenizer, network)


def pixart(scheduler=None, make=PixArtSigmaPipeline, side: int = 8):
    """PixArt-Sigma, which ``examples/own_family.py`` has as well; or alpha."""
    network = PixArtTransformer2DModel(
        sample_size=side, num_layers=1, num_attention_heads=2, attention_head_dim=6, cross_attention_dim=12,
        caption_channels=16, norm_num_groups=4,
    ).eval()  # fmt: skip
    encoder, tokenizer = t5()
    scheduler = scheduler or DDIMScheduler(**SD15)
    return make(tokenizer, encoder, vae(), network, scheduler)


def pixart_alpha(scheduler=None) -> PixArtAlphaPipeline:
    """Of the size that reads micro-conditions."""
    return pixart(scheduler, PixArtAlphaPipeline, 128)


MAKERS = {
    "sd": stable_diffusion,
    "lcm": latent_consistency,
    "sdxl": stable_diffusion_xl,
    "sd3": stable_diffusion_3,
    "flux": flux,
    "sana": sana,
}
NEWER = {
    "sana_sprint": sana_sprint,
    "chroma": chroma,
    "aura_flow": aura_flow,
    "lumina_2": lumina_2,
    "pixart": pixart,
    "pixart_alpha": pixart_alpha,
    "hunyuan_dit": hunyuan_dit,
    "z_image": z_image,
    "flux_2_klein": flux_2_klein,
    "flux_2_dev": flux_2_dev,
    "qwen_image": qwen_image,
}


def warm(samples: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
    """A reward: red above blue, times 100."""
    return 100 * (samples[:, 0] - samples[:, 2]).mean((1, 2))


PROMPTS, NEGATIVES = ["a red cat", "two dogs, 3"], ["dark", "blurred"]
ABOUT = {
    "variant": "",
    "dtype": "float32",
    "checkpointing": False,
    "decode": 2,
    "negatives": NEGATIVES,
    "cache": "",
    "adapters": [],
}
SIDE = {"sana": 32, "sana_sprint": 32, "hunyuan_dit": 64}
UNGUIDED = ("flux", "lcm", "sana_sprint", "flux_2_dev")
"""Families whose networks read the guidance weight, and no negative prompt."""
UNADAPTED = ("pixart", "pixart_alpha", "hunyuan_dit")
"""Families whose pipelines diffusers gives no adapters."""
ALIKE = 1e-4


WORDLESS = "flux_2_klein"
"""A family with guidance whose second answer is always that to no words."""


def about(folder, **settings) -> dict:
    own = {"negatives": ["", ""]} if folder.name in (*UNGUIDED, WORDLESS) else {}
    return {**ABOUT, "name": str(folder), "side": SIDE.get(folder.name, 16), **own, **settings}


def agree(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.dtype == b.dtype == torch.float32
    assert (a - b).abs().max().item() <= ALIKE * max(1.0, b.abs().max().item()), (a - b).abs().max()
