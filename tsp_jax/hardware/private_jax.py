"""The only module that uses private names of JAX, each with the reason why no public name will do."""

import logging
from pathlib import Path

from jax._src import xla_bridge
from jax._src.lib import xla_client  # pyright: ignore[reportPrivateImportUsage]


def register_rocm_plugin(library: Path) -> None:
    """Registers the ROCm compiler by path; the plugin's own entry point refuses a machine without a GPU."""
    options = {**xla_client.generate_pjrt_gpu_plugin_options(), "platform_name": "ROCM"}
    xla_bridge.register_plugin("rocm", priority=500, library_path=str(library), options=options)


def hush_absent_plugins() -> None:
    """Drops the traceback that JAX logs for each installed plugin whose hardware is absent, which is no error here."""
    logger = logging.getLogger(xla_bridge.__name__)
    if _not_about_plugins not in logger.filters:
        logger.addFilter(_not_about_plugins)


def _not_about_plugins(record: logging.LogRecord) -> bool:
    return "plugin configuration error" not in record.getMessage().lower()
