"""Virtual devices of a machine's CPU, and what XLA needs to run collectives on them."""

import os

import jax

from tsp_jax.hardware.private_jax import number_collectives

_LONGEST_WAIT = "--xla_cpu_collective_call_terminate_timeout_seconds"


def use_cpu_devices(number: int) -> None:
    """Makes `number` virtual devices of this machine's CPU all devices that JAX has.

    Call it before anything uses a device. It sets `jax_platforms` and `jax_num_cpu_devices`, and what programs with
    collectives need on such devices: no persistent compilation cache, a channel for each collective
    (`tsp_jax.hardware.private_jax.number_collectives`), and in the environment, unless they are set there, at least
    four threads a device (PJRT_NPROC) and an hour for which one device may wait for another (XLA_FLAGS).
    """
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", number)
    # XLA launches and runs programs with one pool of threads, by default one for each device or core. With 32 programs
    # in flight the launches of the next one wait; if they hold all threads, no earlier program can end: seen on jax
    # 0.10.2 after less than 500 programs. In another pool, of as many threads, collectives wait for each other.
    os.environ.setdefault("PJRT_NPROC", str(max(4 * number, os.cpu_count() or 1)))
    number_collectives()
    # XLA ends the process if a virtual device waits 40 s for another, as it may on a machine that has other work.
    if _LONGEST_WAIT not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} {_LONGEST_WAIT}=3600".lstrip()
    # On jax 0.12 a CPU program read back from the persistent cache no longer orders its collectives: seen to hang,
    # and to give other numbers.
    jax.config.update("jax_enable_compilation_cache", False)
