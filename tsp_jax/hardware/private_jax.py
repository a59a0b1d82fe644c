"""The only module that uses private names of JAX, each with the reason why no public name will do."""

import logging
import re
from pathlib import Path

from jax._src import xla_bridge
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]

from tsp_jax.hardware.devices import is_present


def register_rocm_plugin(library: Path) -> None:
    """Registers the ROCm compiler by path; the plugin's own entry point refuses a machine without a GPU."""
    options = {**xla_client.generate_pjrt_gpu_plugin_options(), "platform_name": "ROCM"}
    xla_bridge.register_plugin("rocm", priority=500, library_path=str(library), options=options)


def hush_absent_plugins() -> None:
    """Drops the traceback that JAX logs for an installed plugin whose hardware is absent: compilers need no hardware.

    All other messages of JAX are logged as before, those about hardware that is present included.
    """
    logging.getLogger(xla_bridge.__name__).addFilter(_is_not_about_absent_hardware)


def _is_not_about_absent_hardware(record: logging.LogRecord) -> bool:
    plugin = re.search(r"plugin configuration error.*jax_plugins\.xla_(rocm|cuda)", record.getMessage())
    return plugin is None or is_present(plugin[1])
