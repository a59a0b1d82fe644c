"""Command lines: flags that make a configuration small, and flags that are refused."""

SIZES = {"d-model": 16, "num-layers": 1, "num-heads": 4, "num-kv-heads": 2, "head-dim": 4, "d-ff": 48}
RUN = {"seq-len": 96, "batch": 4, "optimizer.warmup-steps": 1, "eval-batches": 1}
SMALL = [f"--model.{name}={value}" for name, value in SIZES.items()] + [f"--{name}={RUN[name]}" for name in RUN]
"""makes any configuration small"""

BAD = {
    "unknown layout": (["--layout", "tps"], ["layout=tps", "tp_sp"]),
    "unknown preset of a row": (["--layout", "tps(mlp=tsp)"], ["layout=tps(mlp=tsp): preset 'tps'", "tp_sp"]),
    "row that contradicts itself": (["--layout", "tsp(weights=tsp,mlp=data)"], ["mlp is set twice"]),
    "row that shards batch and sequence by an axis": (["--layout", "tsp(batch=tsp)"], ["batch=tsp and sequence=tsp"]),
    "row whose axis the mesh lacks": (
        ["--layout", "tsp(weights=dta+tsp)", "--mesh", "data=2,tsp=4"],
        ["mesh=data=2,tsp=4 lacks dta"],
    ),
    "row that does not fit": (
        ["--layout", "tsp(sequence=node+tsp)", "--mesh", "node=5,tsp=1"],
        ["seq_len=96 is not divisible by 10 over node,tsp", "use 100"],
    ),
    "unknown axis": (["--mesh", "model=2"], ["'model'", "tsp"]),
    "axis without size": (["--mesh", "tsp"], ["'tsp'", "axis=size"]),
    "axis of size zero": (["--mesh", "tsp=0"], ["tsp=0", "axis=size"]),
    "axis twice": (["--mesh", "tsp=2,tsp=2"], ["twice"]),
    "mesh larger than the devices": (
        ["--mesh", "tsp=16", "--seq-len", "192"],
        ["16", "there are 8", "--cpu-devices 16"],
    ),
    "indivisible sequence": (["--seq-len", "100"], ["seq_len=100", "use 112"]),
    "indivisible batch": (["--mesh", "data=4,tsp=2", "--batch", "6"], ["batch=6", "use 8"]),
    "indivisible micro-batch": (["--accumulate", "3"], ["batch=4", "accumulate=3", "use 6"]),
    "heads": (["--model.num-heads", "5"], ["model.num_heads=5", "model.num_heads=6"]),
    "odd head size": (["--model.head-dim", "5"], ["model.head_dim=5", "model.head_dim=6"]),
    "negative": (["--batch", "-1"], ["batch=-1", "use 1"]),
    "not a number": (["--steps", "many"], ["--steps", "many"]),
    "missing value": (["--steps"], ["--steps"]),
    "unknown flag": (["--stpes", "3"], ["--stpes", "--steps"]),
    "unknown choice": (["--remat", "some"], ["some", "save_attention"]),
    "no such files": (["--data.files", "nowhere/*.txt"], ["data.files", "nowhere"]),
    "text without a tokenizer": (["--data.tokenizer", ""], ["data.tokenizer=''", "--data.tokenizer bytes"]),
    "folder without a tokenizer": (["--data.tokenizer", "nowhere"], ["nowhere/tokenizer.json does not exist"]),
    "empty workdir": (["--workdir", ""], ["workdir=''"]),
    "remote workdir": (["--workdir", "gs://bucket/run"], ["workdir=gs://bucket/run", "where gs:// is mounted"]),
    "remote cache": (["--data.cache-dir", "s3://bucket/c"], ["data.cache_dir=s3://bucket/c"]),
    "remote text": (["--data.files", "hf://datasets/a/*.txt"], ["data.files=hf://datasets/a/*.txt"]),
    "remote weights": (["--init-from", "https://host/model"], ["init_from=https://host/model"]),
    "workdir as a URL": (["--workdir", "file:///tmp/run"], ["workdir=file:///tmp/run", "use /tmp/run"]),
    "sequence longer than the text": (["--seq-len", "96000"], ["seq_len=96000"]),
    "small vocabulary": (["--model.vocab-size", "96"], ["model.vocab_size=96", "token id", "use model.vocab_size="]),
}
"""name -> (flags, words of the line that refuses them)"""
