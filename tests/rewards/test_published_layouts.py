"""The layouts of published reward weights: names and shapes written down here, files of them made small and read.

The files themselves are not in reach of the tests; what is held here is that a file of their layout is loaded whole.
"""

import math
from collections import OrderedDict
from itertools import pairwise

import open_clip
import pytest
import torch
from rounding import ROUNDING
from torch import nn

from rlfusion.common.errors import ConfigError
from rlfusion.common.weights import pack
from rlfusion.rewards import build, task_info
from rlfusion.rewards.aesthetic import read_head
from rlfusion.rewards.clip.names import renamed

PROMPTS = ("a cat", "two dogs")
Shapes = dict[str, tuple[int, ...]]
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 24, "heads": 2, "layers": 3},
}
"""ViT-H/14, of fewer and smaller parts."""


def of(config: dict) -> tuple[int, ...]:
    """Widths, layers, positions and the embedding of a configuration, for the layouts below."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    return vision["width"], vision["layers"], patches + 1, text["width"], text["layers"], config["embed_dim"]


def human_preference(config: dict) -> Shapes:
    """HPS_v2_compressed.pt and HPS_v2.1_compressed.pt, under "state_dict": open_clip's CLIP."""
    v, vision_layers, places, t, text_layers, d = of(config)
    shapes: Shapes = {
        "positional_embedding": (77, t), "text_projection": (t, d), "logit_scale": (),
        "visual.class_embedding": (v,), "visual.positional_embedding": (places, v), "visual.proj": (v, d),
        "visual.conv1.weight": (v, 3, 14, 14), "token_embedding.weight": (49408, t),
    }  # fmt: skip
    for name, width in (("visual.ln_pre", v), ("visual.ln_post", v), ("ln_final", t)):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width, layers in (("visual.", v, vision_layers), ("", t, text_layers)):
        for layer in range(layers):
            block = f"{tower}transformer.resblocks.{layer}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            for part, out, read in (
                ("attn.out_proj", width, width),
                ("mlp.c_fc", 4 * width, width),
                ("mlp.c_proj", width, 4 * width),
            ):
                shapes |= {f"{block}.{part}.weight": (out, read), f"{block}.{part}.bias": (out,)}
            for part in ("ln_1", "ln_2"):
                shapes |= {f"{block}.{part}.weight": (width,), f"{block}.{part}.bias": (width,)}
    return shapes


def pick_score(config: dict) -> Shapes:
    """PickScore_v1's model.safetensors and pytorch_model.bin: a CLIPModel of the transformers of 2023."""
    v, vision_layers, places, t, text_layers, d = of(config)
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    shapes: Shapes = {
        "logit_scale": (), "visual_projection.weight": (d, v), "text_projection.weight": (d, t),
        f"{text}.position_ids": (1, 77), f"{text}.token_embedding.weight": (49408, t),
        f"{text}.position_embedding.weight": (77, t), f"{vision}.class_embedding": (v,),
        f"{vision}.patch_embedding.weight": (v, 3, 14, 14), f"{vision}.position_embedding.weight": (places, v),
        f"{vision}.position_ids": (1, places),
    }  # fmt: skip
    for name, width in (
        ("vision_model.pre_layrnorm", v),
        ("vision_model.post_layernorm", v),
        ("text_model.final_layer_norm", t),
    ):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for tower, width, layers in (("vision_model", v, vision_layers), ("text_model", t, text_layers)):
        for layer in range(layers):
            block, square = f"{tower}.encoder.layers.{layer}", (width, width)
            parts = {f"self_attn.{p}": square for p in ("k_proj", "v_proj", "q_proj", "out_proj")}
            parts |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
            parts |= {"layer_norm1": (width,), "layer_norm2": (width,)}
            for part, shape in parts.items():
                shapes |= {f"{block}.{part}.weight": shape, f"{block}.{part}.bias": shape[:1]}
    return shapes


def filled(shapes: Shapes, dtype: torch.dtype = torch.float32) -> OrderedDict[str, torch.Tensor]:
    """Random weights of a layout; whole numbers where it has positions, and the published scale, 100."""
    generator = torch.Generator().manual_seed(0)
    state = OrderedDict()
    for name, shape in shapes.items():
        drawn = 0.2 * torch.randn(shape, generator=generator)
        state[name] = torch.arange(shape[-1])[None] if name.endswith("position_ids") else drawn.to(dtype)
    state["logit_scale"] = torch.tensor(math.log(100)).to(dtype)
    return state


@pytest.mark.parametrize("layout", [human_preference, pick_score])
def test_the_names_are_those_of_the_whole_architecture(layout):
    """ViT-H/14 in its full size, of tensors without content."""
    config = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in open_clip.CLIP(**config).state_dict().items()}
        state = {name: torch.empty(shape) for name, shape in layout(config).items()}
    held = {name: tuple(t.shape) for name, t in (renamed(state) if layout is pick_score else state).items()}
    assert held == wanted
    assert len(held) == 686


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", TINY)
    return torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1])


def made(name: str, checkpoint: object):
    return build(name, {name: {"checkpoint": str(checkpoint)}}, task_info(PROMPTS, (3, 28, 28)))


@torch.no_grad()
def by_open_clip(state: dict, x: torch.Tensor) -> torch.Tensor:
    """The cosines of samples and their prompts, of open_clip's model with these weights."""
    clip = open_clip.CLIP(**TINY).eval()
    clip.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    mean, std = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images = clip.encode_image((x - mean) / std, normalize=True)
    texts = clip.encode_text(open_clip.SimpleTokenizer()(list(PROMPTS)), normalize=True)
    return (images * texts).sum(1)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_human_preference_file_is_loaded_whole(zipped, tiny, tmp_path):
    """Of halves, beside what a training run leaves, in the newer and the older format of torch."""
    x, cond = tiny
    state = filled(human_preference(TINY), torch.float16)
    beside = {"epoch": 1, "name": "a run", "optimizer": {"state": {}, "param_groups": [{"lr": 1e-6}]}}
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": state, **beside}, file, _use_new_zipfile_serialization=zipped)
    torch.testing.assert_close(made("hps_v2", file)(x, cond), by_open_clip(state, x), **ROUNDING)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pick_score_file_is_loaded_whole_and_its_scale_is_a_hundred(name, tiny, tmp_path):
    x, cond = tiny
    state, file = filled(pick_score(TINY)), tmp_path / name
    if name.endswith(".bin"):
        torch.save(state, file)
    else:
        file.write_bytes(pack(state))
    wanted = 100 * by_open_clip(renamed(state), x)
    torch.testing.assert_close(made("pick_score", file)(x, cond), wanted, rtol=1e-4, atol=1e-3)
    short = {key: tensor for key, tensor in state.items() if key != "text_model.encoder.layers.2.mlp.fc2.bias"}
    torch.save(short, tmp_path / "short.bin")
    with pytest.raises(ConfigError, match=r"another architecture .*resblocks\.2\.mlp\.c_proj\.bias"):
        made("pick_score", tmp_path / "short.bin")


WIDTHS = (768, 1024, 128, 64, 16, 1)


def test_the_aesthetic_heads_are_read_in_their_published_sizes(tmp_path):
    """sac+logos+ava1-l14-linearMSE.pth, whose dropouts leave gaps in the numbers; sa_0_4_vit_l_14_linear.pth."""
    linear = [nn.Linear(m, n) for m, n in pairwise(WIDTHS)]
    numbered = zip((0, 2, 4, 6, 7), linear)
    state = {f"layers.{i}.{part}": t for i, layer in numbered for part, t in layer.state_dict().items()}
    file, x = tmp_path / "sac+logos+ava1-l14-linearMSE.pth", nn.functional.normalize(torch.randn(3, 768), dim=1)
    torch.save(OrderedDict(state), file)
    torch.testing.assert_close(read_head(str(file))(x), nn.Sequential(*linear)(x), **ROUNDING)
    alone = nn.Linear(768, 1)
    torch.save(alone.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    torch.testing.assert_close(read_head(str(tmp_path / "sa_0_4_vit_l_14_linear.pth"))(x), alone(x), **ROUNDING)
    assert open_clip.get_model_config("ViT-L-14-quickgelu")["embed_dim"] == WIDTHS[0]
