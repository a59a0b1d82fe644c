"""How the processes of a run connect, exchange integers, and print warnings. Process 0 is the writer."""

import contextlib
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsp_jax.config import ClusterConfig
from tsp_jax.errors import ConfigError, printable

SHUTDOWN_S = 60
"""seconds that a process waits at exit for the others to exit"""


def join_cluster(cluster: ClusterConfig) -> None:
    """Connects this process to the others of the run, if there are any. Call it before anything uses a device.

    Raises:
      ConfigError: the launcher's environment variables are missing, or the other processes do not answer.
    """
    if cluster.launcher == "none":
        return
    # StopSignals handles SIGTERM and SIGINT in every phase; JAX's service would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = cluster.launcher == "explicit"
    # []: all devices of the host; None: one device per process, from Slurm's or Open MPI's environment
    local = [] if explicit or cluster.process_per == "host" else None
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator or None,
            num_processes=cluster.num_processes if explicit else None,
            process_id=cluster.process_id if explicit else None,
            local_device_ids=local,
            cluster_detection_method=None if explicit else cluster.launcher,
            initialization_timeout=cluster.start_s,
            heartbeat_timeout_seconds=cluster.heartbeat_s,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"cluster.launcher={cluster.launcher} connects no processes ({reason}); start it under that launcher, or "
            "use --cluster.launcher explicit --cluster.coordinator HOST:PORT --cluster.num-processes N "
            "--cluster.process-id I"
        ) from error


def is_writer() -> bool:
    """Whether this process is the writer."""
    return jax.process_index() == 0


def broadcast_from_writer(value: int) -> int:
    """Returns the writer's value on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def gather_from_all(value: int) -> list[int]:
    """Returns the values of all processes, by process index."""
    return [int(each) for each in np.ravel(multihost_utils.process_allgather(np.int32(value)))]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file atomically; does nothing on processes other than the writer. Text is written as UTF-8."""
    if not is_writer():
        return
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # it may be a FIFO, which would be waited for
    try:
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_or_report(path: Path, content: str) -> None:
    """Replaces a file of a run; a failure is reported, and does not end the run."""
    try:
        write_atomically(path, content)
    except OSError as error:
        report(f"{path} cannot be written ({error.strerror})")


def report(text: str) -> None:
    """Prints a warning to stderr, with the process index if there are several processes."""
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"warning: {who}{printable(text)}", file=sys.stderr, flush=True)


def report_once(text: str) -> None:
    """Prints a warning on the writer only; for warnings that are the same on every process."""
    if is_writer():
        report(text)
