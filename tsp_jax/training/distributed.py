"""Many processes: how they find each other, and the few things that they must agree on.

Sizes and ranks are `jax.process_count` and `jax.process_index`. Process 0 is the one that writes.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from tsp_jax.config import ClusterConfig
from tsp_jax.errors import ConfigError

SHUTDOWN_S = 60
"""seconds that a process which leaves waits for the others to leave"""


def join_cluster(cluster: ClusterConfig) -> None:
    """Connects this process with the others of the run, if it has any; must come before anything touches a device.

    Raises:
      ConfigError: the launcher's environment is not there, or the others do not answer.
    """
    if cluster.launcher == "none":
        return
    # Ours does the same for SIGINT too, and in every phase; JAX's would take SIGTERM from it.
    jax.config.update("jax_enable_preemption_service", False)
    explicit = cluster.launcher == "explicit"
    # an empty list restricts nothing; None asks Slurm and Open MPI for one device a process
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
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def from_writer(value: int) -> int:
    """The writer's value, on every process."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def of_every_process(value: int) -> list[int]:
    """Every process's value, in order of processes."""
    return [int(each) for each in np.ravel(multihost_utils.process_allgather(np.int32(value)))]


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is at every moment either the old or the new one; the writer does, the others do not."""
    if is_writer():
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(text)
        temporary.replace(path)


def report(text: str) -> None:
    """A warning, on stderr, with the number of the process where there are several."""
    who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
    print(f"warning: {who}{text}", file=sys.stderr, flush=True)


def report_once(text: str) -> None:
    """A warning about what every process sees; the writer says it."""
    if is_writer():
        report(text)
