"""Peak memory of a configuration's training step, compiled for hardware that need not be there."""

import dataclasses
import json
import time

import tyro

from tsp_jax.cli import load_config
from tsp_jax.inspect import collectives, memory_report, parse, summary
from tsp_jax.layout import get_layout, parse_mesh, place
from tsp_jax.targets import parse_target
from tsp_jax.training.step import make_program


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compile."""

    config: str = "llama_7b"
    target: str = "mi300x:8"
    layouts: tuple[str, ...] = ("tsp", "fsdp_cp", "tp", "sp")
    seq_lens: tuple[int, ...] = (16384, 131072)
    remat: str = "full"


def main(args: Args) -> None:
    """Prints a JSON line for each layout and length."""
    target = parse_target(args.target)
    options = {"xla_gpu_enable_latency_hiding_scheduler": True} if target.hardware.platform == "rocm" else {}
    for layout in args.layouts:
        for seq_len in args.seq_lens:
            config = dataclasses.replace(load_config(args.config), seq_len=seq_len, remat=args.remat)
            devices = target.devices()
            placement = place(layout, devices, **parse_mesh("", get_layout(layout), len(devices)))
            program = make_program(config, placement)
            began = time.perf_counter()
            lowered = program.step.lower(program.abstract_state, program.abstract_batch((1, config.batch, seq_len)))
            compiled = lowered.compile(options)
            compile_s = time.perf_counter() - began
            memory = memory_report(compiled)
            moved = summary(collectives(parse(compiled.as_text()), dict(placement.mesh.shape)))
            line = {
                "layout": layout,
                "mesh": dict(placement.mesh.shape),
                "seq_len": seq_len,
                "peak_gb": round(memory.peak_bytes / 1e9, 2),
                "argument_gb": round(memory.argument_bytes / 1e9, 2),
                "temp_gb": round(memory.temp_bytes / 1e9, 2),
                "moved_gb": {f"{op} {axis}": round(total.bytes / 1e9, 2) for (op, axis), total in moved.items()},
                "compile_s": round(compile_s, 1),
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
