"""Names of tensors in Hugging Face folders, by the variants of the model and its family.

Source: the classes in models/*/modeling_*.py of transformers 5.24.
"""

from typing import NamedTuple

from tsp_jax.config import ModelConfig, Norms
from tsp_jax.hf.families import Family


class Part(NamedTuple):
    """Where a folder holds a parameter."""

    name: str
    """name of the tensor; if every layer has its own, {} stands for the layer number. If every expert has its own, a
    second {} stands for the expert's number; otherwise the first dim of a tensor of experts is the experts"""
    place: int = 0
    """place among the parameters whose rows the tensor holds"""
    transposed: bool = False
    """the tensor has [D, rows]"""
    interleaved: bool = False
    """the rows of these parameters alternate; otherwise those of one follow those of another"""


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_PARTS = "", "self_attn.", "mlp.", "block_sparse_moe."
_LAYER, _ATTENTION, _MLP, _SPARSE = ("model.layers.{}." + part for part in _PARTS)
NAMES = {
    "embed.table": EMBEDDING,
    "layers.attention.w_q": f"{_ATTENTION}q_proj.weight",
    "layers.attention.w_k": f"{_ATTENTION}k_proj.weight",
    "layers.attention.w_v": f"{_ATTENTION}v_proj.weight",
    "layers.attention.w_o": f"{_ATTENTION}o_proj.weight",
    "layers.attention.q_bias": f"{_ATTENTION}q_proj.bias",
    "layers.attention.k_bias": f"{_ATTENTION}k_proj.bias",
    "layers.attention.v_bias": f"{_ATTENTION}v_proj.bias",
    "layers.attention.o_bias": f"{_ATTENTION}o_proj.bias",
    "layers.attention.sinks": f"{_ATTENTION}sinks",
    "layers.attention.q_norm": f"{_ATTENTION}q_norm.weight",
    "layers.attention.k_norm": f"{_ATTENTION}k_norm.weight",
    "layers.mlp.w_gate": f"{_MLP}gate_proj.weight",
    "layers.mlp.w_up": f"{_MLP}up_proj.weight",
    "layers.mlp.w_down": f"{_MLP}down_proj.weight",
    "final_norm.scale": "model.norm.weight",
    "head.table": HEAD,
}
"""our parameter -> name of its tensor, for tensors of one parameter"""
TRANSPOSED = ("layers.attention.w_o", "layers.mlp.w_down")
"""those of them whose tensors have [D, rows]"""
_AFTER_ATTENTION = f"{_LAYER}post_attention_layernorm.weight"
_AFTER_MLP = {"layers.mlp_post_norm.scale": f"{_LAYER}post_feedforward_layernorm.weight"}
_BEFORE = {"layers.attention_norm.scale": f"{_LAYER}input_layernorm.weight"}
NORMS: dict[Norms, dict[str, str]] = {
    "pre": {**_BEFORE, "layers.mlp_norm.scale": _AFTER_ATTENTION},
    "post": {"layers.attention_post_norm.scale": _AFTER_ATTENTION, **_AFTER_MLP},
    "both": {
        **_BEFORE,
        "layers.attention_post_norm.scale": _AFTER_ATTENTION,
        "layers.mlp_norm.scale": f"{_LAYER}pre_feedforward_layernorm.weight",
        **_AFTER_MLP,
    },
}
"""the same for norms: the name post_attention_layernorm stands for another norm where norms follow"""
FUSED = {
    "layers.attention.w_q": Part(f"{_ATTENTION}qkv_proj.weight", 0),
    "layers.attention.w_k": Part(f"{_ATTENTION}qkv_proj.weight", 1),
    "layers.attention.w_v": Part(f"{_ATTENTION}qkv_proj.weight", 2),
    "layers.mlp.w_gate": Part(f"{_MLP}gate_up_proj.weight", 0),
    "layers.mlp.w_up": Part(f"{_MLP}gate_up_proj.weight", 1),
}
"""our parameter -> where it is in fused families"""

EXPERTS = {
    "mlp": {
        "layers.mlp.router": Part(f"{_MLP}gate.weight"),
        "layers.mlp.w_gate": Part(f"{_MLP}experts.{{}}.gate_proj.weight"),
        "layers.mlp.w_up": Part(f"{_MLP}experts.{{}}.up_proj.weight"),
        "layers.mlp.w_down": Part(f"{_MLP}experts.{{}}.down_proj.weight", transposed=True),
    },
    "block_sparse_moe": {
        "layers.mlp.router": Part(f"{_SPARSE}gate.weight"),
        "layers.mlp.w_gate": Part(f"{_SPARSE}experts.{{}}.w1.weight"),
        "layers.mlp.w_up": Part(f"{_SPARSE}experts.{{}}.w3.weight"),
        "layers.mlp.w_down": Part(f"{_SPARSE}experts.{{}}.w2.weight", transposed=True),
    },
    "input_linear": {
        "layers.mlp.router": Part(f"{_SPARSE}router.layer.weight"),
        "layers.mlp.w_gate": Part(f"{_SPARSE}input_linear.weight", 0),
        "layers.mlp.w_up": Part(f"{_SPARSE}input_linear.weight", 1),
        "layers.mlp.w_down": Part(f"{_SPARSE}output_linear.weight", transposed=True),
    },
    "gate_up_proj": {
        "layers.mlp.router": Part(f"{_MLP}router.weight"),
        "layers.mlp.router_bias": Part(f"{_MLP}router.bias"),
        "layers.mlp.w_gate": Part(f"{_MLP}experts.gate_up_proj", 0, transposed=True, interleaved=True),
        "layers.mlp.w_up": Part(f"{_MLP}experts.gate_up_proj", 1, transposed=True, interleaved=True),
        "layers.mlp.w_down": Part(f"{_MLP}experts.down_proj"),
        "layers.mlp.gate_bias": Part(f"{_MLP}experts.gate_up_proj_bias", 0, interleaved=True),
        "layers.mlp.up_bias": Part(f"{_MLP}experts.gate_up_proj_bias", 1, interleaved=True),
        "layers.mlp.down_bias": Part(f"{_MLP}experts.down_proj_bias"),
    },
}
"""the same for a router and experts"""


def tensor_names(config: ModelConfig, family: Family) -> dict[str, Part]:
    """Parameter -> where the folders of a family hold it."""
    names = NAMES | NORMS[config.norms]
    parts = {param: Part(name, transposed=param in TRANSPOSED) for param, name in names.items()}
    if config.experts.number:
        assert family.experts, f"{family.architecture} has no experts"
        parts |= EXPERTS[family.experts.tensors]
    return parts | FUSED if family.fused else parts
