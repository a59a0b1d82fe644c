"""One page of each kind, with the JSON that it was made from; names in it are hostile markup."""

import json
from pathlib import Path
from typing import Any

from tests.builders.hlo import GROUPS
from tsp_jax.tools.inspect import Outputs, TextOptions, inspect_text
from tsp_jax.tools.page import Kind, write_page
from tsp_jax.tools.sweep import Row, rows_json

HOSTILE = "</script><script>pwned=1</script><img src=x onerror=pwned=1>&amp;{{data}}"
STATE = "(f32[1000000], f32[500000])"


def program(name: str = HOSTILE, kernels: int = 30) -> str:
    """The text of a program with a loop in a loop, gathers, many kernels and a scope `name`."""
    inner = f"{_gather('g.1')}{_copy('k.1', '%x', 'jvp()/tsp/attention')}{_done('g.1')}"
    outer = f"{_copy('k.2', '%x', 'tsp/mlp')}  %init.2 = {STATE} tuple(%k.2, %s)\n{_while('inner', '%init.2', 7)}"
    some = "".join(_copy(f"a{n}", f"%a{n - 1}" if n else "%x", f"tsp/part{n}") for n in range(kernels))
    entry = f"""
  %x.0 = f32[1000000] parameter(0), sharding={{replicated}}, metadata={{op_name="{name}"}}
  %s = f32[500000] parameter(1)
{_copy("k", "%x.0", f"tsp/{name}")}  %init = {STATE} tuple(%k, %s)
{_while("outer", "%init", 9)}  %x = f32[1000000] get-tuple-element(%outer), index=0
{_gather("g")}{some}{_done("g")}  ROOT %end = (f32[1000000], f32[4000000]) tuple(%a{kernels - 1}, %g-done)"""
    last = "  %y = f32[1000000] get-tuple-element(%inner), index=0\n"
    bodies = _loop("inner", inner, "%k.1") + _loop("outer", outer + last, "%y")
    return f"HloModule page, is_scheduled=true, num_partitions=8\n{bodies}\n\nENTRY %main () -> f32[] {{{entry}\n}}\n"


def _done(name: str) -> str:
    return f"  %{name}-done = f32[4000000] all-gather-done(%{name})\n"


def _copy(name: str, operand: str, scope: str) -> str:
    return f'  %{name} = f32[1000000] copy({operand}), metadata={{op_name="jit(f)/{scope}/op"}}\n'


def _gather(name: str) -> str:
    kind = f"all-gather-start(%s), {GROUPS}, dimensions={{0}}"
    return f'  %{name} = (f32[500000], f32[4000000]) {kind}, metadata={{op_name="jit(f)/tsp/gather/op"}}\n'


def _while(name: str, initial: str, trips: int) -> str:
    known = f'backend_config={{"known_trip_count":{{"n":"{trips}"}}}}'
    return f"  %{name} = {STATE} while({initial}), condition=%{name}.cond, body=%{name}.body, {known}\n"


def _loop(name: str, body: str, result: str) -> str:
    """Condition and body of a loop; `result` is the new first element of its state."""
    return f"""
%{name}.cond (c: {STATE}) -> pred[] {{
  %c = {STATE} parameter(0)
  ROOT %go = pred[] constant(true)
}}

%{name}.body (b: {STATE}) -> {STATE} {{
  %b = {STATE} parameter(0)
  %x = f32[1000000] get-tuple-element(%b), index=0
  %s = f32[500000] get-tuple-element(%b), index=1
{body}  ROOT %t = {STATE} tuple({result}, %s)
}}
"""


ROWS = [
    Row(
        layout=f"tsp(weights=data+tsp):{n}x4", mesh="data=2,tsp=4", seq_len=seq_len, batch=n, fits=n < 3,
        peak_bytes=n * 17_123_456_789, predicted_bytes=n * 16.9e9, received_bytes=n * 61.25e9, comm_s=0.4321 * n,
        exposed_comm_s=0.1234 * n, step_s=1.2345 * n, step_low_s=1.1 * n, step_high_s=1.9 * n, matmul_s=0.7,
        tokens_per_s=seq_len / n / 1.2345, largest_seq_len=16384 * n, largest_batch=7 * n, compile_s=3.25,
        paper_peak_gb="85-140" if n == 1 else "", note="" if n < 3 else "does not fit 80 GB",
        by_kind={"state": n * 9 * 10**9, "residual": n * 5 * 10**9, "transient": n * 3_123_456_789},
        scenario_steps_s={"typical rates": 1.2345 * n},
    )
    for seq_len in (16384, 131072) for n in (1, 2, 3)
]  # fmt: skip
ROWS.append(Row(layout=HOSTILE, mesh="", seq_len=131072, batch=1, fits=False, note="does not compile: " + HOSTILE))
COMPARISON = {
    "config": "llama", "target": "h100:8", "step": "train", "chunk": 0, "jax": "0.0", "paper": "none", "rates": "",
    "turns": ["one and another at 16384 tokens are a tie"], "device": {"name": "h100", "memory_bytes": 80 * 10**9},
}  # fmt: skip


def _candidate(n: int) -> dict[str, Any]:
    config = {
        "layout": f"tsp:{n + 1}",
        "mesh": "data=1,tsp=8",
        "remat": ["full", "none"][n % 2],
        "bucket_mib": 32.0 * n,
    }
    closed = {
        "peak_bytes": 20e9 + 3e9 * n,
        "step_s": 12.5 - n if n < 5 else 13.25,
        "memory": {"state": 5},
        "seconds": {},
    }
    compiled = {
        "peak_bytes": 10**9 * (21 + 3 * n), "by_kind": {}, "step_s": closed["step_s"] * 1.01, "step_low_s": 8.0,
        "step_high_s": 20.0, "comm_s": 0.5, "exposed_comm_s": 0.0123, "received_bytes": 300e9, "kernel": "triton",
    }  # fmt: skip
    return {
        "config": config | {"zero1": n == 2, "kernel": "auto"}, "closed_form": closed, "on_front": n < 5,
        "compiled": None if n > 5 else compiled, "tokens_per_s": 131072 / closed["step_s"],
        "tokens_per_device_hour": 450 * 131072 / closed["step_s"], "note": HOSTILE * (n == 6),
    }  # fmt: skip


PLAN = {
    "model": "llama_7b", "target": "mi300x:8", "seq_len": 131072, "batch": 1, "minimise": "time",
    "budget": {
        "memory_bytes": 192e9, "fraction": 0.9, "usable_bytes": 172.8e9,
        "reserves": {
            "runtime": {"bytes": 1.5e9, "source": "assumed"}, "collectives": {"bytes": 2e9, "source": HOSTILE},
        },
    },
    "candidates": [_candidate(n) for n in range(40)], "best": 4, "front": [0, 1, 2, 3, 4],
    "longest": {"tsp:8": 3584 * 1024, "fsdp": 432 * 1024}, "longest_offloaded": {"tsp:8": 8192 * 1024},
    "ties": ["one and another are a tie"], "why": ["less of " + HOSTILE], "notes": [],
}  # fmt: skip


def write(kind: Kind, folder: Path, program_text: str = "") -> tuple[Path, dict[str, Any]]:
    """Writes a page; returns it and what --json writes beside it. One of inspect is of `program` or another text."""
    page, file = folder / f"{kind}.html", folder / f"{kind}.json"
    if kind == "inspect":
        text = folder / "program.hlo"
        text.write_text(program_text or program())
        outputs = Outputs(html=str(page), json=str(file))
        assert inspect_text(str(text), TextOptions(target="h100:8", mesh="data=1,tsp=8", outputs=outputs)) == 0
        return page, json.loads(file.read_text())
    data = rows_json(ROWS, COMPARISON) if kind == "compare" else PLAN
    write_page(page, data, kind=kind, title=f"{kind} of {HOSTILE}", lines=[HOSTILE])
    return page, json.loads(json.dumps(data))
