"""The tensors of a CLIPModel of transformers under the names, and in the layout, of open_clip's CLIP.

(1)  q, k, v of an attention are three matrices there and the rows of one, in_proj, here
(2)  a projection is y = W x there and y = x P here, so P = W^T
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

MARK = "vision_model.embeddings.class_embedding"
TOWERS = {"vision_model": "visual.", "text_model": ""}
WHOLE = {
    "logit_scale": "logit_scale",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    **{f"vision_model.pre_layrnorm.{p}": f"visual.ln_pre.{p}" for p in ("weight", "bias")},
    **{f"vision_model.post_layernorm.{p}": f"visual.ln_post.{p}" for p in ("weight", "bias")},
    **{f"text_model.final_layer_norm.{p}": f"ln_final.{p}" for p in ("weight", "bias")},
}
TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
PARTS = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
LAYER = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def is_transformers(state: Mapping[str, object]) -> bool:
    """Whether these are the tensors of a CLIPModel of transformers."""
    return MARK in state


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights for open_clip; a tensor of no known place keeps its name, so that loading refuses it."""
    out = {}
    for name, tensor in state.items():
        if name.endswith("embeddings.position_ids") or ".self_attn.k_proj." in name or ".self_attn.v_proj." in name:
            continue  # whole numbers 0, 1, 2, ...; or Eq. (1), with q
        layer = LAYER.fullmatch(name)
        if name in TRANSPOSED:
            out[TRANSPOSED[name]] = tensor.T.contiguous()  # Eq. (2)
        elif layer and layer[3] == "self_attn.q_proj":
            rows = [state[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            out[f"{_block(layer)}.attn.in_proj_{layer[4]}"] = torch.cat(rows)  # Eq. (1)
        elif layer and layer[3] in PARTS:
            out[f"{_block(layer)}.{PARTS[layer[3]]}.{layer[4]}"] = tensor
        else:
            out[WHOLE.get(name, name)] = tensor
    return out


def _block(layer: re.Match[str]) -> str:
    return f"{TOWERS[layer[1]]}transformer.resblocks.{layer[2]}"
