"""A training run."""

import dataclasses
import re
from typing import Literal, get_args

from tsp_jax.config.checks import check, check_bytes, check_local
from tsp_jax.config.cluster import ClusterConfig, FaultsConfig
from tsp_jax.config.data import DataConfig
from tsp_jax.config.lora import LoraConfig
from tsp_jax.config.model import DType, ModelConfig
from tsp_jax.config.optimizer import OptimizerConfig
from tsp_jax.config.phases import Phase, parse_phases
from tsp_jax.config.stream import StreamConfig
from tsp_jax.errors import ConfigError

Remat = Literal["none", "full", "save_attention", "offload", "offload_attention"]
Logger = Literal["tensorboard", "wandb"]
Plan = Literal["", "fastest", "leanest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. Each file in `configs/` defines one."""

    model: ModelConfig
    stream: StreamConfig = StreamConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoraConfig = LoraConfig()
    faults: FaultsConfig = FaultsConfig()
    cluster: ClusterConfig = ClusterConfig()
    plan: Plan = ""
    """fastest or leanest: choose layout, mesh, remat, accumulate, stream.bucket_mib and optimizer.zero1 for the devices
    and their memory, those without a flag. A run keeps its choice when it is resumed. Empty: as configured. The
    commands choose; in Python, `tsp_jax.plan.choose` does"""
    layout: str = "tsp"
    """a preset (single, dp, fsdp, tp, sp, tp_sp, tsp or fsdp_cp), or a preset with changes, such as
    tsp(weights=data+tsp) or tsp(sequence=node+tsp). A change gives other mesh axes to one dimension: batch, sequence,
    heads, mlp or vocab. The name weights stands for heads, mlp and vocab. The change whole_weights=true gathers all
    weights of an op at once."""
    mesh: str = ""
    """mesh axis sizes, outermost first, such as data=1,tsp=8; empty: all devices on the layout's own axes"""
    cpu_devices: int = 0
    """number of virtual CPU devices per process; 0: use the devices that are present"""
    steps: int
    """optimizer steps of the whole run, and the length of the learning-rate schedule"""
    init_from: str = ""
    """Hugging Face folder with the initial weights; empty: random weights"""
    from_scratch: bool = False
    """start from random weights also if init_from is set, whose tokenizer is used all the same"""
    batch: int
    """sequences per optimizer step, over all devices"""
    seq_len: int
    """S, tokens per sequence"""
    seq_len_schedule: str = ""
    """shorter sequences for the first steps, such as 16384x200,32768x100: 200 steps with sequences of 16384 tokens, 100
    with 32768, then `seq_len`. Evaluations always have `seq_len`"""
    accumulate: int = 1
    """micro-batches per step: the batch is split into this many, and their gradients are summed"""
    compute_dtype: DType = "bfloat16"
    """dtype of activations and of weights in buckets; master weights are float32"""
    grad_dtype: DType = "float32"
    """dtype in which the layers' gradients are stored until the update; micro-batches are always summed in float32"""
    remat: Remat = "save_attention"
    """what backward recomputes: none; full (everything but layer inputs); save_attention (as full, but attention
    outputs are kept too); offload, offload_attention (as full and save_attention, but what is kept is in the host's
    memory)"""
    z_loss: float = 0.0
    """coefficient of the squared log-partition in the loss"""
    seed: int = 0
    """random seed of the initial weights and of the order of data"""
    workdir: str = "runs/default"
    """folder for metrics.jsonl, pictures, checkpoints/ and config.json; a run found there is resumed"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only after the last step"""
    keep_checkpoints: int = 3
    """how many of the newest checkpoints to keep"""
    keep_every: int = 0
    """never delete a checkpoint whose step is divisible by this; 0: off"""
    eval_every: int = 0
    """steps between evaluations on held-out data; 0: only after the last step"""
    eval_batches: int = 8
    """batches per evaluation of a held-out set"""
    log: str = ""
    """where metrics go beside metrics.jsonl: tensorboard, wandb, or tensorboard,wandb"""
    profile: str = ""
    """steps FIRST:LAST, or one step, of which a trace of the profiler is written to the folder profile in workdir"""

    def __post_init__(self):
        not_negative = "cpu_devices z_loss seed checkpoint_every keep_every eval_every"
        check("", self, "steps batch seq_len accumulate keep_checkpoints eval_batches", not_negative)
        tokens = -(-self.batch // self.accumulate) * self.seq_len
        check_bytes("layer inputs in bfloat16", 2 * tokens * self.model.d_model, "", self, "batch seq_len")
        if not self.workdir:
            raise ConfigError("workdir='' is empty; use --workdir runs/default")
        for name in ("workdir", "init_from"):
            check_local(name, getattr(self, name))
        if self.lora.rank:
            self.model.refuse_experts(f"lora.rank={self.lora.rank}")
        if self.optimizer.name == "muon":
            self.model.refuse_experts("optimizer.name=muon")
        experts = self.model.experts
        if experts.number > 1 and experts.per_token == 1 and experts.normalize:
            raise ConfigError(
                "model.experts.per_token=1 with model.experts.normalize=True weights every choice with 1, so the loss "
                "says nothing to the router; use model.experts.normalize=False or model.experts.per_token=2"
            )
        self.phases()
        self.loggers()
        self.profiled_steps()

    @property
    def weights_from(self) -> str:
        """Folder of the initial weights; empty: random ones."""
        return "" if self.from_scratch else self.init_from

    def phases(self) -> tuple[Phase, ...]:
        """The phases of the schedule of sequence lengths; without a schedule, one phase."""
        return parse_phases(self.seq_len_schedule, self.seq_len)

    def loggers(self) -> tuple[Logger, ...]:
        """The names in `log`; raises ConfigError if one is unknown."""
        names = tuple(name.strip() for name in self.log.split(",")) if self.log else ()
        for name in names:
            if name not in get_args(Logger) or names.count(name) > 1:
                raise ConfigError(f"log={self.log} has {name!r:.80}; use tensorboard, wandb, or tensorboard,wandb")
        return names  # pyright: ignore[reportReturnType]

    def profiled_steps(self) -> tuple[int, int] | None:
        """(first, last) of `profile`; None if it is empty. Raises ConfigError if the run has no such steps."""
        if not self.profile:
            return None
        found = re.fullmatch(r"([0-9]{1,10})(?::([0-9]{1,10}))?", self.profile)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= self.steps:
            use = f"{min(10, self.steps)}:{min(13, self.steps)}"
            why = "has steps after the last one" if 1 <= first <= last else "is no range of steps"
            raise ConfigError(f"profile={self.profile!r:.80} {why}, steps={self.steps}; use profile={use}")
        return first, last
