"""The command tsp-generate: prints text as it is sampled, then throughput and peak memory."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal, TextIO

import jax
import tyro
from jax.sharding import Mesh

from tsp_jax.config import StreamConfig
from tsp_jax.errors import ConfigError
from tsp_jax.files import MAX_BYTES
from tsp_jax.hf.byte_tokenizer import ByteTokenizer
from tsp_jax.hf.tokenizer import Tokenizer
from tsp_jax.inference import Model, Sampling, Stats, generate, load
from tsp_jax.inference.model import read_facts
from tsp_jax.inspect.units import format_bytes
from tsp_jax.layout import Placement, get_layout, parse_mesh
from tsp_jax.mesh import format_sizes, make_mesh
from tsp_jax.ops.kernels import describe_kernel
from tsp_jax.ops.kernels.mask import Scores
from tsp_jax.tools import cli
from tsp_jax.tools.planned import plan_serving


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Prompt, sampling and devices."""

    prompt: str = ""
    """text to continue"""
    prompt_file: str = ""
    """file with the text to continue"""
    chat: bool = False
    """wrap the prompt in the model's chat template, as a user message"""
    max_new_tokens: int = 64
    """tokens to generate, unless a stop token comes first"""
    step: int = 0
    """step of the checkpoint, where the model is the working directory of a run; 0: the newest"""
    stop: bool = True
    """end at the model's stop tokens"""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)
    plan: Literal["", "fastest"] = ""
    """fastest: choose layout, mesh and chunk, those without a flag, for the devices, the prompt and the new tokens, by
    closed forms. Empty: as given"""
    layout: str = "tsp"
    """as in training: tsp, tp_sp, fsdp or another preset; or a layout of your own, such as tsp(weights=data+tsp)"""
    mesh: str = ""
    """mesh axis sizes, such as tsp=8; empty: all devices on the layout's own axes"""
    cpu_devices: int = 0
    """run on this many virtual CPU devices; 0: on the devices that are present"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of weights, activations and KV cache; auto: float32 if config.json says so, else bfloat16"""
    capacity: int = 0
    """tokens that fit into the KV cache; 0: prompt plus new tokens"""
    chunk: int = 0
    """largest number of prompt tokens that are prefilled at once; 0: 2048"""
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)

    def __post_init__(self):
        for name in ("cpu_devices", "step"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative; use 0")


def generate_text(
    folder: str, options: GenerateOptions, out: TextIO | None = None, notes: TextIO | None = None
) -> Stats:
    """Continues a text with the model in a Hugging Face folder, or of a training run in its working directory.

    `out` (None: stdout) receives the text token by token, `notes` (None: stderr) throughput and peak memory.
    """
    prompt = _prompt(options)
    if options.plan:
        options = _planned(folder, options, prompt, sys.stderr if notes is None else notes)
    layout = get_layout(options.layout)
    placement = Placement(layout, make_mesh(parse_mesh(options.mesh, layout, len(jax.devices()))))
    model = load(folder, placement, dtype=options.dtype, stream=options.stream, step=options.step)
    if model.tokenizer is None:
        raise ConfigError(f"{folder} was trained on token ids of no known tokenizer; use tsp_jax.inference.generate")
    tokens = _encode(model.tokenizer, options, prompt)
    stats, decoder = Stats(), model.tokenizer.decoder()

    def write(text: str) -> None:
        print(text, end="", file=out, flush=True)

    generate(
        model, [tokens], max_new_tokens=options.max_new_tokens, sampling=options.sampling,
        stop_tokens=model.stop_tokens if options.stop else (), capacity=options.capacity, chunk=options.chunk,
        stats=stats, on_token=lambda _, token: write(decoder.step(token)),
    )  # fmt: skip
    write(decoder.finish() + "\n")
    print(throughput(model, stats), file=sys.stderr if notes is None else notes)
    return stats


def _encode(tokenizer: Tokenizer | ByteTokenizer, options: GenerateOptions, prompt: str) -> list[int]:
    text = tokenizer.chat(prompt) if options.chat else prompt
    return tokenizer.encode(text, special=not options.chat)


def _planned(folder: str, options: GenerateOptions, prompt: str, notes: TextIO) -> GenerateOptions:
    """The options with the fastest layout, mesh and chunk for this prompt."""
    facts = read_facts(folder, dtype=options.dtype, step=options.step)
    tokens = len(_encode(facts.tokenizer, options, prompt)) if facts.tokenizer else 0
    way = plan_serving(
        facts.config, facts.dtype, capacity=max(options.capacity, tokens + options.max_new_tokens),
        new_tokens=options.max_new_tokens, layout=options.layout, mesh=options.mesh,
    )  # fmt: skip
    chunk = options.chunk or way.chunk
    print(f"plan=fastest: {way.layout} {way.mesh}, chunks of {chunk} tokens, by closed forms", file=notes)
    return dataclasses.replace(options, layout=way.layout, mesh=way.mesh, chunk=chunk)


def _prompt(options: GenerateOptions) -> str:
    if bool(options.prompt) == bool(options.prompt_file):
        given = "both prompt and prompt_file are given" if options.prompt else "prompt='' is empty"
        raise ConfigError(f'{given}; use --prompt "some text" or --prompt-file FILE')
    if options.prompt:
        return options.prompt
    try:
        with Path(options.prompt_file).open("rb") as file:  # may be a pipe: <(command), /dev/stdin
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"prompt_file={options.prompt_file} cannot be read as text ({error}); use another") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"prompt_file={options.prompt_file} has more than {MAX_BYTES:,} bytes; use a shorter text")
    if not text:
        raise ConfigError(f"prompt_file={options.prompt_file} is empty; use a file that holds text")
    return text


def throughput(model: Model, stats: Stats) -> str:
    """One line with prefill's attention kernel, tokens per second in prefill and decode, and peak memory per device."""
    mesh = format_sizes(model.placement.mesh.shape)
    kernel = describe_kernel(
        model.stream.kernel, model.placement.mesh, model.config.head_dim, model.dtype, Scores.of(model.config)
    )
    decoded = f"{stats.decoded_tokens / stats.decode_s:,.1f} tokens/s" if stats.decoded_tokens else "nothing"
    peak, source = peak_bytes(model)
    return (
        f"{model.placement.layout.name} ({mesh}), attention kernel {kernel}: prefill {stats.prompt_tokens:,} tokens, "
        f"{stats.prompt_tokens / stats.prefill_s:,.1f} tokens/s; decode {stats.new_tokens:,} tokens, {decoded}; "
        f"peak {format_bytes(peak)} per device ({source})"
    )


def peak_bytes(model: Model) -> tuple[int, str]:
    """(peak bytes per device, source): "measured" if all devices count their bytes, else "compiled"."""
    mesh = model.placement.mesh
    counts = [device.memory_stats() or {} for device in mesh.local_devices] if isinstance(mesh, Mesh) else []
    if counts and all("peak_bytes_in_use" in count for count in counts):
        return max(count["peak_bytes_in_use"] for count in counts), "measured"
    return max(program.peak_bytes for program in model.programs.values()), "compiled"


def main() -> None:
    """Runs the command."""
    with cli.errors_in_a_line():
        folder, options = cli.first_argument(
            GenerateOptions(), what="model", about="Continue a text with a Hugging Face folder or a training run."
        )
        cli.use_devices(options.cpu_devices)
        generate_text(folder, options)
