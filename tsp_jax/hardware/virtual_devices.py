"""Virtual devices of a machine's CPU, and what XLA needs to run collectives on them."""

import os

import jax

_CPU_FLAGS = {
    # XLA ends the process if a virtual device waits 40 s for another, as it may on a machine that has other work.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "3600",
    # XLA's order of operations for concurrency lets a loop with collectives run beside later collectives, in another
    # order on another device. Both then wait for ever, or take part in each other: on jax 0.10.2 with an embedding of
    # 49,152 rows in one of five runs with one thread a device, and in all of seven with more.
    "--xla_cpu_enable_concurrency_optimized_scheduler": "false",
}
"""XLA's flag -> what it is for virtual devices"""


def use_cpu_devices(number: int) -> None:
    """Makes `number` virtual devices of this machine's CPU all devices that JAX has.

    Call it before anything uses a device. It sets `jax_platforms` and `jax_num_cpu_devices`, and what programs with
    collectives need on such devices: no persistent compilation cache, and in the environment, unless they are set
    there, at least two threads a device (PJRT_NPROC), an hour for which one device may wait for another, and an order
    of operations that is the same on all devices (XLA_FLAGS).
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    # XLA launches and runs programs with one pool of threads, by default one for each device or core. With 32 programs
    # in flight the launches of the next one wait; if they hold all threads, no earlier program can end: seen on jax
    # 0.10.2 after less than 500 programs. Twice as many threads leave one for each device to run on.
    os.environ.setdefault("PJRT_NPROC", str(max(2 * number, os.cpu_count() or 1)))
    flags = os.environ.get("XLA_FLAGS", "")
    missing = (f"{name}={value}" for name, value in _CPU_FLAGS.items() if name not in flags)
    os.environ["XLA_FLAGS"] = " ".join([*flags.split(), *missing])
    # On jax 0.12 a CPU program read back from the persistent cache no longer orders its collectives: seen to hang,
    # and to give other numbers.
    jax.config.update("jax_enable_compilation_cache", False)
