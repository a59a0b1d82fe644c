"""The processes of a run, and reactions to faults."""

import dataclasses
from typing import Literal

from tsp_jax.config.checks import check
from tsp_jax.errors import ConfigError

Launcher = Literal["none", "slurm", "ompi", "mpi4py", "k8s", "explicit"]
ProcessPer = Literal["gpu", "host"]
FailedSave = Literal["continue", "stop"]


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
        check("faults.", self, positive="skip_limit", not_negative="hang_s")


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
        check(owner, self, positive="num_processes start_s heartbeat_s")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"{owner}process_id={self.process_id} is not one of {self.num_processes} processes; "
                f"use 0 to {self.num_processes - 1}"
            )
        _, colon, port = self.coordinator.rpartition(":")
        if (self.coordinator or self.launcher == "explicit") and not (colon and port.isdecimal()):
            raise ConfigError(f"{owner}coordinator={self.coordinator!r} is no HOST:PORT; use localhost:7654")
