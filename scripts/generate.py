"""Continue a text with a Hugging Face model, on any layout: text to stdout as it comes, what it took to stderr.

python scripts/generate.py models/smollm2 --prompt "What is gravity?" --chat --mesh tsp=8 --cpu-devices 8
python scripts/generate.py MODEL --prompt-file book.txt --layout tp_sp --mesh model=2,seq=4 --max-new-tokens 256
"""

from tsp_jax.tools.cli import errors_in_a_line, first_argument, use_devices
from tsp_jax.tools.generate import GenerateOptions, run

if __name__ == "__main__":
    with errors_in_a_line():
        model, options = first_argument(GenerateOptions(), what="model")
        use_devices(options.cpu_devices)
        run(model, options)
