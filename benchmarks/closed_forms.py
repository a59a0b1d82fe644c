"""Closed forms of memory and time of mixtures of experts, beside compiled and simulated steps: a table for a note.

python benchmarks/closed_forms.py        # for 8 x MI300X, without them: 20 minutes on 2 busy cores

Prints rows of benchmarks/closed_forms.md: peak memory (compiled, and `tsp_jax.plan.estimate`), and seconds of a step
(simulated from the compiled program at typical rates, and by the closed form).
"""

import dataclasses
from typing import Any

import tyro

from tsp_jax.config import Config, ExpertsConfig, ModelConfig, OptimizerConfig, StreamConfig
from tsp_jax.hardware.targets import Target, parse_target, use_target
from tsp_jax.plan.compile import compile_step
from tsp_jax.plan.estimate import estimate
from tsp_jax.tools.cli import load_config

MIXTURE = Config(
    model=ModelConfig(
        vocab_size=32000, d_model=2048, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=128, d_ff=1024,
        experts=ExpertsConfig(number=32, per_token=4, balance_loss=0.001),
    ),
    stream=StreamConfig(mlp_movement="gather"),
    optimizer=OptimizerConfig(warmup_steps=1), grad_dtype="bfloat16", steps=2, batch=1, seq_len=65536, workdir="unused",
)  # fmt: skip


def cases(qwen: Config) -> dict[tuple[str, str], Config]:
    """(model, what differs) -> configuration."""

    def stream(config: Config, **changes: Any) -> Config:
        return dataclasses.replace(config, stream=dataclasses.replace(config.stream, **changes))

    def experts(**changes: Any) -> Config:
        model = MIXTURE.model
        return dataclasses.replace(
            MIXTURE, model=dataclasses.replace(model, experts=dataclasses.replace(model.experts, **changes))
        )

    large = {
        "": qwen,
        "`--stream.mlp-movement activations`": stream(qwen, mlp_movement="activations"),
        "`--stream.mlp-movement ring`": stream(qwen, mlp_movement="ring"),
        "`--layout fsdp_cp`": dataclasses.replace(qwen, layout="fsdp_cp"),
        "`--seq-len 32768 --remat none`": dataclasses.replace(qwen, seq_len=32768, remat="none"),
        "`--layout fsdp --mesh data=8 --batch 8 --seq-len 4096`": dataclasses.replace(
            qwen, layout="fsdp", mesh="data=8", batch=8, seq_len=4096
        ),
        "`--stream.expert-kernel xla`": stream(qwen, expert_kernel="xla"),
    }
    norms = dataclasses.replace(MIXTURE.model, norms="both")
    small = {
        "tsp, gather": MIXTURE,
        "activations": stream(MIXTURE, mlp_movement="activations"),
        "ring": stream(MIXTURE, mlp_movement="ring"),
        "remat none": dataclasses.replace(MIXTURE, remat="none"),
        "activations, remat full": dataclasses.replace(stream(MIXTURE, mlp_movement="activations"), remat="full"),
        "norms before and after": dataclasses.replace(MIXTURE, model=norms),
        "two shared experts": experts(shared=2),
        "fsdp_cp": dataclasses.replace(MIXTURE, layout="fsdp_cp"),
        "tp": dataclasses.replace(MIXTURE, layout="tp", mesh=""),
        "sp": dataclasses.replace(MIXTURE, layout="sp", mesh=""),
        "tp_sp, model=2, seq=4": dataclasses.replace(MIXTURE, layout="tp_sp", mesh="data=1,model=2,seq=4"),
        "tsp(sequence=node+tsp), node=2, tsp=4": dataclasses.replace(
            MIXTURE, layout="tsp(sequence=node+tsp)", mesh="data=1,node=2,tsp=4"
        ),
    }
    named = {"qwen3_30b_a3b": large, f"{MIXTURE.model.experts.number} experts": small}
    return {(model, name): config for model, rows in named.items() for name, config in rows.items()}


@dataclasses.dataclass(frozen=True)
class Args:
    """What to compile for."""

    target: str = "mi300x:8"


def row(config: Config, target: Target) -> str:
    """Cells of one configuration."""
    found, formed = compile_step(config, target).report(), estimate(config, target, ("typical rates",))
    assert found.memory and found.timeline
    peak, step = found.memory.peak_bytes / 1e9, found.timeline.step_s
    off = (100 * (form / real - 1) for form, real in ((formed.peak_bytes / 1e9, peak), (formed.step_s, step)))
    memory, time = (f"{each:+.1f}" for each in off)
    return f"{peak:.2f} | {formed.peak_bytes / 1e9:.2f} | {memory} | {step:.4g} | {formed.step_s:.4g} | {time} |"


def main(args: Args) -> None:
    """Prints a row as soon as it is known."""
    target = parse_target(args.target)
    use_target(target)
    print("| model | flags | peak GB | form | % | step s | form | % |\n|---|---|---|---|---|---|---|---|")
    for (model, name), config in cases(load_config("qwen3_30b_a3b")).items():
        print(f"| {model} | {name} | {row(config, target)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
