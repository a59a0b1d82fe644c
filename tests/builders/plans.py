"""Steps that no compiler has seen: closed forms and compiled rows with known figures."""

from tests.builders.steps import CONFIG
from tsp_jax.hardware.rates import SCENARIOS
from tsp_jax.plan.compiled import Compiled
from tsp_jax.plan.estimate import Estimate

TYPICAL = next(iter(SCENARIOS))


def closed_form(step_s: float, peak_bytes: float) -> Estimate:
    """An estimate of one part and one term."""
    moments = {"update": {"state": peak_bytes}}
    return Estimate(config=CONFIG, moments=moments, scenarios={TYPICAL: {"products": step_s}}, received_bytes=0.0)


def compiled_row(step_s: float, peak_bytes: float, **changes) -> Compiled:
    """A compiled step without communication, the same at all rates."""
    fields = {
        "peak_bytes": int(peak_bytes), "by_kind": {"state": int(peak_bytes)}, "host_bytes": 0, "step_s": step_s,
        "peak_at": "", "parts": {"state": [int(peak_bytes), ""]},
        "step_low_s": step_s, "step_high_s": step_s, "scenario_steps_s": dict.fromkeys(SCENARIOS, step_s),
        "compute_s": step_s, "contention_s": 0.0, "comm_s": 0.0, "exposed_comm_s": 0.0, "exposed_host_s": 0.0,
        "matmul_s": step_s, "received_bytes": 0.0, "kernel": "xla", "compile_s": 1.0,
    }  # fmt: skip
    return Compiled(**(fields | changes))
