"""The only module that uses private names of JAX, each with the reason why no public name will do."""

import functools
import importlib
import logging
import re
import threading
from pathlib import Path
from typing import Any

from jax._src import xla_bridge
from jax._src.interpreters import mlir
from jax._src.lax import parallel
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

from tsp_jax.hardware.devices import is_present

_HANDLERS = ("_solver", "_hybrid", "_linalg", "_prng", "_sparse")
"""modules of the ROCm plugin with handlers of custom calls, such as those of eigh, svd and qr"""


def register_rocm_plugin(library: Path, package: str, *, late: bool) -> None:
    """Registers the ROCm compiler by path; the plugin's own entry point refuses a machine without a GPU.

    With a GPU, JAX registers the plugin by that entry point, and nothing is done here. Without one, the plugin's
    profiler is left out: it asks ROCm's libraries for the time, and ends the process where stand-ins take their place.

    The compiler refuses a custom call without a handler. jaxlib registers handlers when it is imported, from modules
    that do not load where ROCm is not installed.

    Args:
      library: the plugin.
      package: its package of Python modules.
      late: whether those modules load only since stand-ins for ROCm's libraries were loaded.
    """
    if is_present("rocm"):
        return
    options = {**xla_client.generate_pjrt_gpu_plugin_options(), "platform_name": "ROCM"}
    api = xla_client.load_pjrt_plugin_dynamically("rocm", str(library))
    xla_bridge.register_backend_factory(
        "rocm",
        functools.partial(xla_bridge.make_pjrt_c_api_client, "rocm", options=options),
        priority=500,
        make_topology=functools.partial(xla_client.make_c_api_device_topology, api),
        c_api=api,
    )
    extension = importlib.import_module(f"{package}.rocm_plugin_extension")
    register = functools.partial(extension.register_custom_call_target, api)
    xla_client.register_custom_call_handler("ROCM", register)
    for module in _HANDLERS if late else ():
        for name, handler in importlib.import_module(f"{package}.{module}").registrations().items():
            xla_client.register_custom_call_target(name, handler, platform="ROCM", api_version=1)


def hush_absent_plugins() -> None:
    """Drops the traceback that JAX logs for an installed plugin whose hardware is absent: compilers need no hardware.

    All other messages of JAX are logged as before, those about hardware that is present included.
    """
    logging.getLogger(xla_bridge.__name__).addFilter(_is_not_about_absent_hardware)


def _is_not_about_absent_hardware(record: logging.LogRecord) -> bool:
    plugin = re.search(r"plugin configuration error.*jax_plugins\.xla_(rocm|cuda)", record.getMessage())
    return plugin is None or is_present(plugin[1])


_COLLECTIVES = (
    parallel.all_gather_p, parallel.all_gather_invariant_p, parallel.all_to_all_p, parallel.pmax_p, parallel.pmin_p,
    parallel.ppermute_p, parallel.psum_p, parallel.psum_invariant_p, parallel.reduce_scatter_p,
)  # fmt: skip
_lowering = threading.RLock()


def number_collectives() -> None:
    """Gives each collective that is lowered for CPUs a channel of its own within its module.

    JAX gives all collectives of `jax.shard_map` the same channel, by which XLA's virtual CPU devices find each other.
    If a loop with collectives runs beside other collectives, as XLA lets it, devices meet in different ones: then the
    process ends, or stands still. With channels of their own, several collectives may be under way at once.
    """
    for primitive in _COLLECTIVES:
        rule = mlir._lowerings[primitive].rule
        mlir.register_lowering(primitive, functools.partial(_lower_numbered, rule), platform="cpu", cacheable=False)


def _lower_numbered(rule: Any, ctx: Any, *args: Any, **params: Any) -> Any:
    with _lowering:
        shared = mlir.COLLECTIVE_CHANNEL_ID
        mlir.COLLECTIVE_CHANNEL_ID = ctx.module_context.new_channel()
        try:
            return rule(ctx, *args, **params)
        finally:
            mlir.COLLECTIVE_CHANNEL_ID = shared
