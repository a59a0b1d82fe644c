"""Link-time stand-ins for ROCm's shared libraries, so that its compiler loads where ROCm is not installed.

JAX's ROCm plugin links against libraries that compilation never calls. For each library that is missing, a shared
object of the same name is built. It defines the symbols and symbol versions that the plugin needs; every function in it
returns an error code. With stand-ins, programs can be compiled but not run. Building them needs gcc and binutils.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tsp_jax.errors import ConfigError

SYSTEM = re.compile(r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|ld-linux.*)\.so")
PROVIDERS = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "librt.so.1", "libpthread.so.0")
TOOLS = ("gcc", "nm", "readelf")


def load_rocm_libraries(plugin_libraries: list[Path], cache: Path) -> set[str]:
    """Loads the libraries that the plugin needs: ROCm's own if installed, else stand-ins, whose names it returns.

    Stand-ins are built once for each version of the plugin, in the folder `cache`.

    Raises:
      ConfigError: a tool that builds stand-ins is missing.
    """
    missing = [name for name in _needed(plugin_libraries) if not _loads(name)]
    if not missing:
        return set()
    digest = hashlib.sha256("\n".join(str((p, p.stat().st_size)) for p in plugin_libraries).encode()).hexdigest()[:16]
    folder = cache / f"rocm-standins-{digest}"
    if not folder.exists():
        _build(plugin_libraries, missing, folder)
    for path in sorted(folder.iterdir()):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return set(missing)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _needed(libraries: list[Path]) -> list[str]:
    texts = (_run("readelf", "-dW", str(library)) for library in libraries)
    names = (name for text in texts for name in re.findall(r"NEEDED.*\[(.*)\]", text))
    return list(dict.fromkeys(name for name in names if not SYSTEM.match(name)))


def _loads(soname: str) -> bool:
    try:
        ctypes.CDLL(soname, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _symbols(libraries: list[Path], missing: list[str]) -> dict[str, dict[str, str]]:
    """missing library -> symbol -> version of the symbol, empty if it has none"""
    owners: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for library in libraries:
        file = ""
        for line in _run("readelf", "-VW", str(library)).splitlines():
            if match := re.search(r"File: (\S+)", line):
                file = match[1]
            if (match := re.search(r"Name: (\S+)\s+Flags", line)) and file in missing:
                owners[match[1]] = file
        for line in _run("nm", "-D", "--undefined-only", str(library)).splitlines():
            kind, name = line.split()[-2:]
            if kind != "w":
                name, _, version = name.replace("@@", "@").partition("@")
                wanted[name] = version
    provided = _provided()
    symbols: dict[str, dict[str, str]] = {name: {} for name in missing}
    for name, version in wanted.items():
        if name in provided or name.startswith(("Py", "_Py")) or (version and version not in owners):
            continue
        # The loader looks for symbols without a version in every library, so any one may define them.
        symbols[owners.get(version, missing[0])][name] = version
    return symbols


def _provided() -> set[str]:
    paths = (_run("gcc", f"-print-file-name={library}").strip() for library in PROVIDERS)
    lines = (line for path in paths for line in _run("nm", "-D", "--defined-only", path).splitlines())
    return {line.split()[-1].partition("@")[0] for line in lines}


def _build(libraries: list[Path], missing: list[str], folder: Path) -> None:
    for tool in TOOLS:
        if not shutil.which(tool):
            raise ConfigError(f"{tool} is missing, which builds stand-ins for ROCm; install gcc and binutils, or ROCm")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        built = Path(scratch, "built")
        built.mkdir()
        for soname, symbols in _symbols(libraries, missing).items():
            _compile(soname, symbols, Path(scratch), built / soname)
        if not folder.exists():  # another process may have built them meanwhile
            os.rename(built, folder)


def _compile(soname: str, symbols: dict[str, str], scratch: Path, out: Path) -> None:
    source, script = scratch / f"{soname}.c", scratch / f"{soname}.map"
    source.write_text("".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(symbols)))
    versions: dict[str, str] = {}
    for name, version in symbols.items():
        versions[version] = versions.get(version, "") + f" {name};"
    versions.pop("", None)
    script.write_text("".join(f"{version} {{ global:{names} }};\n" for version, names in versions.items()))
    flags = [f"-Wl,--version-script={script}"] if versions else []
    _run("gcc", *flags, "-shared", "-fPIC", "-fno-builtin", "-w", f"-Wl,-soname,{soname}", "-o", str(out), str(source))
