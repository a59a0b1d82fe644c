"""Names of tensors in Hugging Face folders, by the variants of the model and its family.

Source: the classes in models/*/modeling_*.py of transformers 5.24.
"""

from tsp_jax.config import ModelConfig, Norms
from tsp_jax.hf.families import Family

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
    "layers.attention.q_norm": f"{_ATTENTION}q_norm.weight",
    "layers.attention.k_norm": f"{_ATTENTION}k_norm.weight",
    "layers.mlp.w_gate": f"{_MLP}gate_proj.weight",
    "layers.mlp.w_up": f"{_MLP}up_proj.weight",
    "layers.mlp.w_down": f"{_MLP}down_proj.weight",
    "final_norm.scale": "model.norm.weight",
    "head.table": HEAD,
}
"""our parameter -> name of the tensor in a folder; {} stands for the layer number"""
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
    "layers.attention.w_q": (f"{_ATTENTION}qkv_proj.weight", 0),
    "layers.attention.w_k": (f"{_ATTENTION}qkv_proj.weight", 1),
    "layers.attention.w_v": (f"{_ATTENTION}qkv_proj.weight", 2),
    "layers.mlp.w_gate": (f"{_MLP}gate_up_proj.weight", 0),
    "layers.mlp.w_up": (f"{_MLP}gate_up_proj.weight", 1),
}
"""our parameter -> (name of a tensor that holds the rows of several, its place among them), in fused families"""

EXPERTS = {
    "mlp": {
        "layers.mlp.router": (f"{_MLP}gate.weight", 0),
        "layers.mlp.w_gate": (f"{_MLP}experts.{{}}.gate_proj.weight", 0),
        "layers.mlp.w_up": (f"{_MLP}experts.{{}}.up_proj.weight", 0),
        "layers.mlp.w_down": (f"{_MLP}experts.{{}}.down_proj.weight", 0),
    },
    "block_sparse_moe": {
        "layers.mlp.router": (f"{_SPARSE}gate.weight", 0),
        "layers.mlp.w_gate": (f"{_SPARSE}experts.{{}}.w1.weight", 0),
        "layers.mlp.w_up": (f"{_SPARSE}experts.{{}}.w3.weight", 0),
        "layers.mlp.w_down": (f"{_SPARSE}experts.{{}}.w2.weight", 0),
    },
    "input_linear": {
        "layers.mlp.router": (f"{_SPARSE}router.layer.weight", 0),
        "layers.mlp.w_gate": (f"{_SPARSE}input_linear.weight", 0),
        "layers.mlp.w_up": (f"{_SPARSE}input_linear.weight", 1),
        "layers.mlp.w_down": (f"{_SPARSE}output_linear.weight", 0),
    },
}
"""the same for a router and experts. If each expert has its own tensor, a second {} stands for the expert's number;
otherwise the first dim of a tensor is the experts"""


def tensor_names(config: ModelConfig, family: Family) -> dict[str, tuple[str, int]]:
    """Parameter -> (name of its tensor, its place among the parameters whose rows the tensor holds)."""
    names = {param: (name, 0) for param, name in (NAMES | NORMS[config.norms]).items()}
    if config.experts.number:
        assert family.experts, f"{family.architecture} has no experts"
        names |= EXPERTS[family.experts.tensors]
    return names | FUSED if family.fused else names
