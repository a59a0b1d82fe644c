"""The configuration of a run: frozen, keyword-only dataclasses. No arrays, no jax.

Every field is a command-line flag (``--model.d-model 512``). Values that are wrong on every layout and machine are
refused here; `tsp_jax.layout.check_fits` refuses a configuration that does not fit its mesh.
"""

import dataclasses
import math
import numbers
import re
from typing import Literal, get_args, get_origin, get_type_hints

from tsp_jax.errors import ConfigError, removal

Activation = Literal["silu", "gelu"]
AttentionMovement = Literal["auto", "gather", "activations"]
Movement = Literal["auto", "gather", "ring", "activations"]
Order = Literal["zigzag", "contiguous"]
Remat = Literal["none", "full", "save_attention", "offload", "offload_attention"]
DType = Literal["float32", "bfloat16"]
TokenOrder = Literal["any", "contiguous", "zigzag"]
RopeKind = Literal["none", "linear", "llama3"]
Launcher = Literal["none", "slurm", "ompi", "mpi4py", "k8s", "explicit"]
ProcessPer = Literal["gpu", "host"]
FailedSave = Literal["continue", "stop"]

LARGEST = 2**31 - 1
"""the largest integer accepted: indices have 32 bits"""
FLOAT32 = (2.0**-126, 2.0**128)
"""(smallest normal float32, a bound above every finite float32). Programs flush smaller values than the first to 0."""
_TYPES = {bool: bool, int: numbers.Integral, float: numbers.Real, str: str}
MOST_BYTES = 5 * 10**15
"""more than any target holds: the largest, 16,384 MI355X, has 4.7e15 bytes of memory"""


def _check(owner: str, config: object, positive: str = "", not_negative: str = "") -> None:
    """Raises ConfigError if a Literal field has an unknown value, or a number is infinite, NaN or out of bounds.

    The command line checks Literal types already; this also covers configurations written in Python.
    """
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if type(None) in get_args(hint):
            if value is None:
                continue
            hint = get_args(hint)[0]
        if line := removal(f"{owner}{name}={value}"):
            raise ConfigError(line)
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise ConfigError(f"{owner}{name}={value} is unknown; use one of {', '.join(get_args(hint))}")
        if hint in _TYPES and not isinstance(value, _TYPES[hint]):
            raise ConfigError(f"{owner}{name}={value!r:.80} is a {type(value).__name__}; use a {hint.__name__}")
        if isinstance(value, float) and not abs(value) < FLOAT32[1]:
            raise ConfigError(f"{owner}{name}={value} is not finite{' in float32' * math.isfinite(value)}; use 1.0")
        if isinstance(value, int) and value > LARGEST:
            raise ConfigError(f"{owner}{name}={value} is too large; use {LARGEST} at most")
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and not value >= FLOAT32[0]:
            use = 1 if isinstance(value, int) else 1.0
            raise ConfigError(f"{owner}{name}={value} must be positive{' in float32' * (value > 0)}; use {use}")
    for name in not_negative.split():
        if getattr(config, name) < 0:
            raise ConfigError(f"{owner}{name}={getattr(config, name)} must not be negative; use 0")


def _check_bytes(what: str, nbytes: int, owner: str, config: object, fields: str) -> None:
    """Raises ConfigError if no target has `nbytes` of memory.

    `fields`: the fields that set this size. The error names the largest of them.
    """
    if nbytes > MOST_BYTES:
        name = max(fields.split(), key=lambda name: getattr(config, name))
        too_many = f"{what} of {nbytes:.2e} bytes, more than any target holds"
        raise ConfigError(f"{owner}{name}={getattr(config, name)} makes {too_many}; use a smaller {owner}{name}")


def check_local(name: str, path: str) -> None:
    """Raises ConfigError if a path is a URL, such as gs://bucket/run, which Python's own functions do not open."""
    scheme, separator, rest = path.partition("://")
    if separator and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        local = f"/{rest.lstrip('/')}" if scheme == "file" else f"a folder where {scheme}:// is mounted"
        raise ConfigError(f"{name}={path} is not on a file system; use {local}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are scaled for contexts longer than those a model was first trained on."""

    kind: RopeKind = "none"
    """linear: divide all frequencies by factor; llama3: divide low ones by factor, keep high ones,
    interpolate between"""
    factor: float = 1.0
    """divisor of the scaled frequencies"""
    low_freq_factor: float = 1.0
    """llama3: a frequency with fewer periods than this in the original context is low"""
    high_freq_factor: float = 4.0
    """llama3: a frequency with more periods than this in the original context is high"""
    original_context: int = 8192
    """llama3: context length of pretraining, in tokens (original_max_position_embeddings)"""

    def __post_init__(self):
        owner = "model.rope_scaling."
        _check(owner, self, positive="factor low_freq_factor high_freq_factor original_context")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"{owner}high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}; "
                f"use {4 * self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer: Llama-like by default, Qwen3-like with ``qk_norm=True``."""

    vocab_size: int
    """V, vocabulary size"""
    d_model: int
    """D, width of the residual stream"""
    num_layers: int
    """L, decoder layers"""
    num_heads: int
    """N, query heads"""
    num_kv_heads: int
    """K, key/value heads; divides num_heads"""
    head_dim: int
    """H, width of one head; need not be D / N"""
    d_ff: int
    """F, hidden width of the gated MLP"""
    activation: Activation = "silu"
    """activation of the gate: silu makes SwiGLU, gelu makes GeGLU"""
    qk_norm: bool = False
    """RMSNorm over each query and key head before RoPE (Qwen3)"""
    tie_embeddings: bool = False
    """the output head is the embedding table"""
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    rope_scaling: RopeScaling = RopeScaling()
    """scaling of the rotary frequencies for long contexts"""
    window: int | None = None
    """sliding window: a token attends to this many tokens, itself and those just before it; None: to all before it"""
    attention_scale: float | None = None
    """factor of the products of queries and keys; None: 1 / sqrt(head_dim)"""
    attention_softcap: float | None = None
    """bound c of the absolute scores s, which become c tanh(s / c) (Gemma 2); None: no bound"""
    attention_sinks: bool = False
    """a learned score without a value for each query head (gpt-oss)"""
    norm_eps: float = 1e-5
    """added to the mean square in every RMSNorm"""
    init_std: float = 0.02
    """standard deviation of initial weights; divided by sqrt(2 L) for projections into the residual stream"""

    def __post_init__(self):
        sizes = "vocab_size d_model num_layers num_heads num_kv_heads head_dim d_ff"
        scores = "window attention_scale attention_softcap"
        _check("model.", self, positive=f"{sizes} rope_theta norm_eps init_std {scores}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
                f"use model.num_heads={-(-self.num_heads // self.num_kv_heads) * self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim={self.head_dim} is odd, RoPE rotates pairs; use model.head_dim={self.head_dim + 1}"
            )
        _check_bytes("weights in bfloat16", 2 * self.num_params, "model.", self, sizes)

    @property
    def num_params(self) -> int:
        """Number of parameters, without padding."""
        heads = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.d_model
        small = 2 * self.d_model + 2 * self.head_dim * self.qk_norm + self.num_heads * self.attention_sinks
        layer = heads + 3 * self.d_ff * self.d_model + small
        tables = self.vocab_size * self.d_model * (1 if self.tie_embeddings else 2)
        return self.num_layers * layer + tables + self.d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What moves on folded axes, which shard both weights and tokens, and what bounds activation memory.

    One bucket size serves every layout and mesh; the numbers of buckets and chunks follow from it and from shapes.
    Layouts with `Layout.whole_weights` gather all weights of an op in one bucket.
    """

    attention_movement: AttentionMovement = "auto"
    """gather: all-gather weights, one bucket of heads at a time; activations: leave weights where they are, all-gather
    tokens and reduce-scatter outputs; auto: whichever of the two receives fewer bytes"""
    mlp_movement: Movement = "auto"
    """as attention_movement; ring: send weights from neighbour to neighbour, one rank's shard at a time, as in
    arXiv 2604.26294"""
    vocab_movement: Movement = "auto"
    """as mlp_movement, for the embedding and the output head"""
    bucket_mib: float = 64.0
    """approximate size of a bucket in MiB. A bucket is what a device receives at a time: weights, keys and values, or
    tokens. On folded axes it is at most a quarter of an op's weights or tokens. Two buckets are in memory at once. A
    chunk of tokens is multiplied with one bucket. The float32 product is at most as large as two buckets."""
    grad_dtype: DType = "float32"
    """dtype in which weight gradients are reduce-scattered"""
    kernel: str = "auto"
    """attention kernel: xla runs everywhere; triton is for MI300X, MI355X and H100; cudnn is for NVIDIA GPUs, and
    leaves documents that cross chunks of the sequence to triton; tpu is for v5p, v5e, v6e and v7x; auto: the first of
    cudnn, triton, tpu and xla that can compute the heads. Of triton and tpu, triton has run on H100 alone, and tpu on
    no TPU yet."""

    def __post_init__(self):
        _check("stream.", self, positive="bucket_mib")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text and its order."""

    files: str = ""
    """glob of text files, or of .npy files of token ids; empty: the Python standard library's sources"""
    cache_dir: str = ""
    """folder of tokenized text; empty: $XDG_CACHE_HOME/tsp_jax or ~/.cache/tsp_jax"""
    order: Order = "zigzag"
    """how the tokens of a sequence are ordered over ranks: contiguous, or zigzag, which balances causal attention"""
    prefetch: int = 2
    """number of batches that the host prepares ahead"""

    def __post_init__(self):
        _check("data.", self, positive="prefetch")
        for name in ("files", "cache_dir"):
            check_local(f"data.{name}", getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up, cosine decay and global-norm clipping.

    If the configuration file defines its own `optimizer` (optax), only `zero1` applies, and flags for the other fields
    are refused.
    """

    learning_rate: float = 3e-4
    """peak learning rate"""
    warmup_steps: int = 100
    """steps of linear warm-up from 0; a run that has no more steps than this warms up for a tenth of its steps"""
    final_fraction: float = 0.1
    """learning rate after the last step, as a fraction of the peak"""
    b1: float = 0.9
    """decay rate of the first moment"""
    b2: float = 0.95
    """decay rate of the second moment"""
    eps: float = 1e-8
    """added to the square root of the second moment"""
    weight_decay: float = 0.1
    """decoupled weight decay; not applied to norm scales"""
    clip_norm: float = 1.0
    """largest global norm of the gradients; gradients above it are scaled down to it"""
    zero1: bool = False
    """ZeRO-1: also shard the optimizer state over the data axis"""
    moments_dtype: DType = "float32"
    """dtype in which both moments are stored between steps; updates are computed in float32"""

    def __post_init__(self):
        _check("optimizer.", self, "learning_rate eps clip_norm", "warmup_steps weight_decay final_fraction")
        for name in ("b1", "b2"):
            flag, value = f"optimizer.{name}", getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{flag}={value} must lie in [0, 1); use 0.9")
            # bfloat16 rounds by up to 2^-8: a moment that shrinks by less in a step never shrinks.
            if self.moments_dtype == "bfloat16" and value > 1 - 2**-8:
                too_slow = f"{flag}={value} is too slow for optimizer.moments_dtype=bfloat16"
                raise ConfigError(f"{too_slow}; use {flag}=0.99, or float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultsConfig:
    """Reactions to faults (docs/reliability.md)."""

    failed_save: FailedSave = "continue"
    """if a checkpoint cannot be saved: continue training and report it, or stop with exit code 78"""
    hang_s: float = 1800.0
    """if no step ends within this many seconds, print the stack of every thread and exit with code 76; 0: never"""
    skip_limit: int = 10
    """stop with exit code 77 after this many consecutive steps with a non-finite loss or gradient (each is skipped)"""

    def __post_init__(self):
        _check("faults.", self, positive="skip_limit", not_negative="hang_s")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The processes of a run and how they connect."""

    launcher: Launcher = "none"
    """none: one process; slurm, ompi, mpi4py, k8s: the processes that the launcher's environment describes; explicit:
    the processes that the fields below describe"""
    coordinator: str = ""
    """HOST:PORT of process 0; empty: from the launcher"""
    num_processes: int = 1
    """explicit: number of processes of the run"""
    process_id: int = 0
    """explicit: index of this process, from 0"""
    process_per: ProcessPer = "gpu"
    """slurm and ompi: one process per GPU, or one per host with all its GPUs"""
    start_s: int = 300
    """seconds that processes wait for the others at the start"""
    heartbeat_s: int = 100
    """seconds without a heartbeat after which a process counts as dead and the others exit"""

    def __post_init__(self):
        owner = "cluster."
        _check(owner, self, positive="num_processes start_s heartbeat_s")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"{owner}process_id={self.process_id} is not one of {self.num_processes} processes; "
                f"use 0 to {self.num_processes - 1}"
            )
        _, colon, port = self.coordinator.rpartition(":")
        if (self.coordinator or self.launcher == "explicit") and not (colon and port.isdecimal()):
            raise ConfigError(f"{owner}coordinator={self.coordinator!r} is no HOST:PORT; use localhost:7654")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. Each file in `configs/` defines one."""

    model: ModelConfig
    stream: StreamConfig = StreamConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    faults: FaultsConfig = FaultsConfig()
    cluster: ClusterConfig = ClusterConfig()
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
    batch: int
    """sequences per optimizer step, over all devices"""
    seq_len: int
    """S, tokens per sequence"""
    accumulate: int = 1
    """micro-batches per step: the batch is split into this many, and their gradients are summed"""
    compute_dtype: DType = "bfloat16"
    """dtype of activations and of weights in buckets; master weights are float32"""
    grad_dtype: DType = "float32"
    """dtype in which the layers' gradients are stored until the update; micro-batches are always summed in float32"""
    remat: Remat = "full"
    """what backward recomputes: none; full (everything but layer inputs); save_attention (as full, but attention
    outputs are kept too); offload, offload_attention (as full and save_attention, but what is kept is in the host's
    memory)"""
    z_loss: float = 0.0
    """coefficient of the squared log-partition in the loss"""
    seed: int = 0
    """random seed of the initial weights and of the order of data"""
    workdir: str = "runs/default"
    """folder for metrics.jsonl, loss.png, checkpoints/ and config.json; a run found there is resumed"""
    checkpoint_every: int = 0
    """steps between checkpoints; 0: only after the last step"""
    keep_checkpoints: int = 3
    """how many of the newest checkpoints to keep"""
    keep_every: int = 0
    """never delete a checkpoint whose step is divisible by this; 0: off"""
    eval_every: int = 0
    """steps between evaluations on held-out data; 0: only after the last step"""
    eval_batches: int = 8
    """batches per evaluation"""

    def __post_init__(self):
        not_negative = "cpu_devices z_loss seed checkpoint_every keep_every eval_every"
        _check("", self, "steps batch seq_len accumulate keep_checkpoints eval_batches", not_negative)
        tokens = -(-self.batch // self.accumulate) * self.seq_len
        _check_bytes("layer inputs in bfloat16", 2 * tokens * self.model.d_model, "", self, "batch seq_len")
        if not self.workdir:
            raise ConfigError("workdir='' is empty; use --workdir runs/default")
        for name in ("workdir", "init_from"):
            check_local(name, getattr(self, name))
