"""The configuration of a run: frozen, keyword-only dataclasses. No arrays, no jax.

Every field is a command-line flag (``--model.d-model 512``). Values that are wrong on every layout and machine are
refused here; `tsp_jax.layout.check_fits` refuses a configuration that does not fit its mesh.
"""

from tsp_jax.config.checks import FLOAT32, LARGEST, MOST_BYTES, check_local
from tsp_jax.config.cluster import ClusterConfig, FailedSave, FaultsConfig, Launcher, ProcessPer
from tsp_jax.config.data import ChatLoss, DataConfig, InvalidText, LongDocuments, Order, PackingName, TokenOrder
from tsp_jax.config.experts import ExpertsConfig, RouterScores
from tsp_jax.config.lora import TARGETS, LoraConfig, Target
from tsp_jax.config.model import Activation, DType, LayerKind, ModelConfig, Norms, NormWidth
from tsp_jax.config.optimizer import OptimizerConfig, OptimizerName
from tsp_jax.config.phases import Phase
from tsp_jax.config.rope import RopeKind, RopeScaling
from tsp_jax.config.run import Config, Remat
from tsp_jax.config.stream import AttentionMovement, Movement, StreamConfig

__all__ = [
    "FLOAT32",
    "LARGEST",
    "MOST_BYTES",
    "TARGETS",
    "Activation",
    "AttentionMovement",
    "ChatLoss",
    "ClusterConfig",
    "Config",
    "DType",
    "DataConfig",
    "ExpertsConfig",
    "FailedSave",
    "FaultsConfig",
    "InvalidText",
    "Launcher",
    "LayerKind",
    "LongDocuments",
    "LoraConfig",
    "ModelConfig",
    "Movement",
    "NormWidth",
    "Norms",
    "OptimizerConfig",
    "OptimizerName",
    "Order",
    "PackingName",
    "Phase",
    "ProcessPer",
    "Remat",
    "RopeKind",
    "RopeScaling",
    "RouterScores",
    "StreamConfig",
    "Target",
    "TokenOrder",
    "check_local",
]
