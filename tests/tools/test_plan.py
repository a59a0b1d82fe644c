"""tsp-plan as a user types it: files that other commands load, wrong input in one line."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.steps import CONFIG
from tsp_jax.config import RopeScaling
from tsp_jax.hardware.targets import parse_target
from tsp_jax.plan.compile import place_on
from tsp_jax.plan.limits import numbers_of_devices
from tsp_jax.tools import cli, plan
from tsp_jax.tools.config_file import config_flags, config_source

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ["tiny", "--target", "cpu:8", "--seq-len", "64", "--batch", "1", "--model.num-layers", "1"]
CHANGED = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
        CONFIG.model, window=16, layer_kinds=("sliding", "full"), rope_scaling=RopeScaling(kind="linear", factor=2.0)
    ),
    optimizer=dataclasses.replace(CONFIG.optimizer, zero1=True, b2=0.9),
    workdir="runs/a folder's name",
)


def test_plan_script(tmp_path):
    """The written configuration is the planned one, and fits the target."""
    flags = (
        "--compilations 1 --workers 1 --remat full --stream.bucket-mib 0.5 --out out.py --json out.json --png out.png "
        "--html out.html"
    )
    command = [sys.executable, str(SCRIPTS / "plan.py"), *SMALL, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    (held,) = re.findall(r'id="data">(.*?)</script>', (tmp_path / "out.html").read_text())
    assert json.loads(held) == content
    best = content["candidates"][content["best"]]
    assert best["compiled"]["step_s"] == min(c["compiled"]["step_s"] for c in content["candidates"] if c["compiled"])
    config = cli.load_config(str(tmp_path / "out.py"))
    assert (config.layout, config.mesh, config.remat) == (best["config"]["layout"], best["config"]["mesh"], "full")
    assert (config.seq_len, config.batch, config.model.num_layers, config.cpu_devices) == (64, 1, 1, 8)
    assert place_on(config, parse_target("cpu:8")).mesh.size == 8
    assert content["command"] in done.stdout and content["command"].endswith("train.py out.py")
    assert "Longest context of each layout" in done.stdout and (tmp_path / "out.png").stat().st_size > 5000


def main(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(plan, "use_target", lambda target: None)  # the devices of this process are in use
    monkeypatch.setattr(sys, "argv", ["scripts/plan.py", *arguments])
    plan.main()


@pytest.mark.parametrize("minimise", ["time", "memory", "cost"])
def test_how_many_devices(monkeypatch, capsys, tmp_path, minimise):
    """By closed forms alone."""
    flags = ["--target", "cpu:?", "--compilations", "0", "--minimise", minimise, "--json", str(tmp_path / "o.json")]
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, *SMALL, *flags, "--batch", "8", "--remat", "full", "--layout", "tsp")
    assert ended.value.code == 0
    number = int(json.loads((tmp_path / "o.json").read_text())["target"].partition(":")[2])
    assert number in numbers_of_devices(parse_target("cpu:1").hardware)
    printed = capsys.readouterr().out
    assert "devices are enough" in printed and "half of the ideal gain" in printed


def test_nodes_are_whole(monkeypatch, tmp_path):
    flags = ["--target", "mi300x", "--nodes", "2", "--compilations", "0", "--json", str(tmp_path / "o.json")]
    with pytest.raises(SystemExit):
        main(monkeypatch, *SMALL, *flags, "--layout", "tsp")
    assert json.loads((tmp_path / "o.json").read_text())["target"] == "mi300x:16"


@pytest.mark.parametrize("batch", [1, 8])
def test_a_plan_for_serving(monkeypatch, capsys, tmp_path, batch):
    """By closed forms alone."""
    flags = ["--target", "mi300x:8", "--seq-len", "32768", "--batch", str(batch), "--compilations", "0"]
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, "llama_7b", "--serve", *flags, "--json", str(tmp_path / "o.json"))
    assert ended.value.code == 0
    content, printed = json.loads((tmp_path / "o.json").read_text()), capsys.readouterr().out
    ways = content["ways"]
    times = [way["prefill_s"] + content["new_tokens"] * way["decode_s"] for way in ways]
    assert times == sorted(times)
    heads, width, layers = 32, 128, 32
    least = 2 * 2 * layers * heads * width * batch * 32768 / 8
    assert least <= ways[0]["cache_bytes"] <= 1.01 * least
    command = f"generate.py FOLDER --layout '{ways[0]['layout']}' --mesh {ways[0]['mesh']} --chunk {ways[0]['chunk']}"
    assert command in content["command"] if batch == 1 else content["command"] == ""
    assert content["command"] in printed and ways[0]["mesh"] in printed
    assert "ms/token" in printed and "cache GB" in printed


def test_serving_keeps_the_layout_of_a_flag(monkeypatch, tmp_path):
    flags = ["--target", "mi300x:8", "--seq-len", "8192", "--batch", "1", "--compilations", "0", "--layout", "tp"]
    with pytest.raises(SystemExit):
        main(monkeypatch, "llama_7b", "--serve", *flags, "--json", str(tmp_path / "o.json"))
    assert {way["layout"] for way in json.loads((tmp_path / "o.json").read_text())["ways"]} == {"tp"}


WRONG = {
    "a file that serving has not": (["--serve", "--out", "a.py"], "out=a.py means nothing to a plan for serving"),
    "an aim that serving has not": (["--serve", "--minimise", "memory"], "minimise=memory means nothing to a plan"),
    "serving on any number": (["--serve", "--target", "cpu:?"], "target=cpu:? says no number of devices to serve on"),
    "serving on too little": (["--serve", "--memory", "0.000001"], "tokens fit on no layout: the least is"),
    "new tokens of a training step": (["--new-tokens", "5"], "new_tokens=5 means nothing to a plan for training"),
    "no new token": (["--serve", "--new-tokens", "0"], "new_tokens=0 must be at least 1"),
    "unknown target": (["--target", "mi400x:8"], "target=mi400x:8 is unknown"),
    "target without devices": (["--target", "mi300x"], "target=mi300x does not say how many devices; use mi300x:8"),
    "no device": (["--target", "mi300x:0"], "target=mi300x:0 does not say how many devices"),
    "nodes beside a number": (["--target", "mi300x:8", "--nodes", "2"], "use --target mi300x --nodes 2"),
    "nodes of TPUs": (["--target", "v5p", "--nodes", "2"], "nodes=2 counts nodes of GPUs, and target=v5p is no GPU"),
    "nodes and devices": (
        ["--target", "h100:8", "--nodes", "2"],
        "target=h100:8 says how many devices itself; use --target h100",
    ),
    "no memory": (["--memory", "0"], "memory=0 must be above 0"),
    "more memory than there is": (["--memory", "1.5"], "memory=1.5 must be above 0 and at most 1"),
    "a mesh of another layout": (["--layout", "tp", "--mesh", "data=1,tsp=8"], "layout tp has no axis 'tsp'"),
    "a mesh of fewer devices": (["--mesh", "data=1,tsp=4"], "has 4 devices, the target 8"),
    "a batch that no layout divides": (["--layout", "dp", "--batch", "3"], "batch=3 is not divisible by 8"),
    "a model that fits nowhere": (["--memory", "0.000001"], "fits on no layout: the least is"),
    "a folder that does not exist": (["--out", "nowhere/plan.py"], "out=nowhere/plan.py cannot be written"),
    "a file of another kind": (["--out", "plan.yaml"], "out=plan.yaml is no .py file; use plan.py"),
    "no process": (["--workers", "0"], "workers=0 must be at least 1"),
    "unknown aim": (["--minimise", "noise"], "noise"),
    "weights that are not here": (["--init-from", "gs://a/b"], "init_from=gs://a/b is not on a file system"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_before_a_compilation(case, monkeypatch, capsys):
    flags, words = WRONG[case]
    monkeypatch.setattr("tsp_jax.plan.worker.Worker._start", lambda self: pytest.fail("compiled"))
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, *SMALL, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2
    assert len(lines) == 1 and words in lines[0]


def test_flags_that_fix_what_a_plan_chooses():
    flags = "tiny --stream.bucket-mib=2 --optimizer.no-zero1 --config.remat full --seq-len 64 --layout tp"
    assert plan.fixed_fields(flags.split()) == {"stream.bucket_mib", "optimizer.zero1", "remat", "layout"}


@pytest.mark.parametrize("config", [CONFIG, CHANGED], ids=["plain", "changed"])
def test_a_configuration_survives_its_source(config, tmp_path):
    (tmp_path / "c.py").write_text(config_source(config, "About."))
    assert cli.load_config(str(tmp_path / "c.py")) == config


def test_a_configuration_survives_its_flags():
    base = cli.load_config("tiny")
    changed = dataclasses.replace(base, optimizer=CHANGED.optimizer, stream=CONFIG.stream, workdir=CHANGED.workdir)
    assert cli.parse(["tiny", *shlex.split(config_flags(changed, base))])[1] == changed
