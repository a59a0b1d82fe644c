"""What ``plan.py --serve`` prints: which layout, mesh and prefill chunk serve a model, and the command that does."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.table import Column, Table

from tsp_jax.config import Config
from tsp_jax.cost import serving as closed_forms
from tsp_jax.hardware.targets import Target, standins_note
from tsp_jax.inspect.render import console
from tsp_jax.layout import get_layout
from tsp_jax.mesh import parse_sizes
from tsp_jax.plan.serving import Serving, choose_serving
from tsp_jax.tools.model_folder import is_model
from tsp_jax.tools.planned import fixed_fields

_SHOWN = 8
"""ways that are printed"""


def plan_to_serve(
    name: str, config: Config, target: Target, *, memory: float, new_tokens: int, finalists: int, workers: int,
    path: str,
) -> None:  # fmt: skip
    """Prints the ways to serve `batch` sequences of `seq_len` tokens, and the command of the fastest; may write JSON.

    Args:
      name: of the model, as the command has it.
      config: model, context, batch and compute dtype.
      target: devices, present or not.
      memory: share of a device's memory that a program may fill.
      new_tokens: tokens to generate for each sequence.
      finalists: ways to compile; 0: closed forms alone decide.
      workers: processes that compile.
      path: file for the JSON; empty: none.

    Raises:
      ConfigError: nothing fits, or the tokens divide over no layout.
    """
    ways = choose_serving(
        config.model, config.seq_len, config.batch, target, new_tokens=new_tokens, dtype=config.compute_dtype,
        memory=memory, fixed=fixed_fields(sys.argv[1:]) & {"layout", "mesh"}, layout=config.layout, mesh=config.mesh,
        finalists=finalists, workers=workers,
    )  # fmt: skip
    command = _command(name, config, ways[0])
    rows = [{**dataclasses.asdict(way), "cache_bytes": cache_bytes(config, way)} for way in ways]
    if path:
        facts = {"model": name, "target": str(target), "context": config.seq_len, "batch": config.batch}
        facts |= {"new_tokens": new_tokens, "command": command, "jax": jax.__version__}
        Path(path).write_text(json.dumps({**facts, "ways": rows}, indent=1) + "\n")
    out = console()
    how = f"compiled with jax {jax.__version__}" if ways[0].is_compiled else "by closed forms alone"
    heading = f"{name}: {config.batch} x {config.seq_len} tokens of context on {target}, {how}"
    out.print(", ".join(filter(None, [heading, standins_note()])), soft_wrap=True, highlight=False)
    out.print(_table(config, ways[:_SHOWN], new_tokens), soft_wrap=True)
    several = f"serve {config.batch} sequences through tsp_jax.inference: {ways[0].layout} {ways[0].mesh}"
    last = f"serve with: {command}" if command else f"{several}, chunks of {ways[0].chunk} tokens"
    out.print(last, soft_wrap=True, highlight=False, markup=False)


def cache_bytes(config: Config, way: Serving) -> float:
    """Bytes of keys and values of all contexts on one device."""
    sizes = parse_sizes(way.mesh)
    layout = get_layout(way.layout).without([axis for axis, size in sizes.items() if size == 1])
    return closed_forms.cache_bytes(config, layout, sizes)


def _table(config: Config, ways: Sequence[Serving], new_tokens: int) -> Table:
    names = ("chunk", "cache GB", "peak GB", "prefill s", "ms/token", "tokens/s", f"s with {new_tokens} new tokens")
    left = [Column(name, overflow="fold") for name in ("layout", "mesh")]
    table = Table(*left, *(Column(name, justify="right") for name in names))
    for way in ways:
        figures = f"{cache_bytes(config, way) / 1e9:.2f}", f"{way.peak_bytes / 1e9:.2f}", f"{way.prefill_s:.3g}"
        rates = f"{1e3 * way.decode_s:.3g}", f"{config.batch / way.decode_s:,.0f}", f"{way.seconds(new_tokens):.4g}"
        table.add_row(way.layout, way.mesh, str(way.chunk), *figures, *rates)
    return table


def _command(name: str, config: Config, way: Serving) -> str:
    """The command that serves one sequence; empty for several, which no command serves."""
    if config.batch > 1:
        return ""
    generate = "tsp-generate"
    if sys.argv[0].endswith(".py"):
        generate = f"python {Path(sys.argv[0]).with_name('generate.py')}"
    folder = name if is_model(name) else "FOLDER"
    flags = f"--layout '{way.layout}' --mesh {way.mesh} --chunk {way.chunk} --capacity {config.seq_len}"
    return f"{generate} {folder} {flags} --dtype {config.compute_dtype}"
