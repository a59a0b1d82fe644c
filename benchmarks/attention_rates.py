"""The step of a configuration at the rates of attention kernels that others published, such as AMD's AITER.

Command:  python benchmarks/attention_rates.py qwen3_8b --target mi300x:8 --mesh data=1,tsp=8 --kernels triton,aiter
Needs:    the compiler of the target (aot-rocm, aot-cuda or aot-tpu).

Attention is a stand-in in the compiled program. It declares causal attention's products, 2 forward and 5 backward for
each pair of query and key, and computes nothing. The timeline prices them at the kernel's rate in
`tsp_jax/hardware/rate_tables.py`. Peak memory and communication are compiled, seconds are simulated: low to high
(typical). The program of a kernel that this package has is what `scripts/inspect_hlo.py` shows, with that kernel's own
tiles and products.
"""

import dataclasses
from typing import Annotated

import tyro

from tsp_jax.config import Config
from tsp_jax.errors import ConfigError
from tsp_jax.hardware.rates import ATTENTION_KERNELS
from tsp_jax.hardware.targets import parse_target, use_target
from tsp_jax.plan.compile import compile_step
from tsp_jax.tools import cli
from tsp_jax.tools.priced import priced_kernel
from tsp_jax.training.optimizer import Optimizer

BACKWARD_PRODUCTS = 5
"""scores, dp, dq, dk and dv, in one kernel"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    target: str = "mi300x:8"
    """devices to compile for, which need not be present"""
    kernels: str = "triton,aiter"
    """attention kernels with published rates, separated by commas"""


def compare_rates(name: str, options: Options, optimizer: Optimizer = None) -> int:
    """Compiles the step once for each kernel, and prints a line for each; returns the exit code."""
    kernels = options.kernels.split(",")
    if unknown := [kernel for kernel in kernels if kernel not in ATTENTION_KERNELS]:
        raise ConfigError(f"kernels={unknown[0]:.80} has no rates; use {', '.join(ATTENTION_KERNELS)}")
    target = parse_target(options.target)
    use_target(target)
    config = options.config
    for kernel in kernels:
        with priced_kernel(kernel, BACKWARD_PRODUCTS) as stand_in:
            stream = dataclasses.replace(config.stream, kernel=stand_in)
            found = compile_step(dataclasses.replace(config, stream=stream), target, optimizer=optimizer).report()
        assert found.timeline is not None
        step = found.timeline.band()
        seconds = f"{step.low:.4g} to {step.high:.4g} s ({step.typical:.4g})"
        print(
            f"{name} on {target}, attention at {kernel}'s rates: peak {found.peak_bytes / 1e9:.2f} GB, step {seconds}"
        )
    return 0


if __name__ == "__main__":
    cli.main(compare_rates, lambda config: Options(config=config), about=(__doc__ or "").splitlines()[0])
