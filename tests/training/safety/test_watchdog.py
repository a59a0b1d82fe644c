"""What hangs is shown and ended, whatever it hangs in."""

import subprocess
import sys

import pytest

from tests.builders.runs import ROOT
from tsp_jax.errors import HUNG

HANG = """
import ctypes, sys, time
from tsp_jax.training.safety.watchdog import Watchdog
def stuck():
    if sys.argv[1] == "petted":
        for step in range(4):
            time.sleep(0.5)
            dog.pet(f"step {step}")
    elif sys.argv[1] == "keeps the lock":
        ctypes.PyDLL(None).sleep(100)
    else:
        time.sleep(100)
with Watchdog(1.5) as dog:
    dog.pet("step 41")
    stuck()
print("went on")
"""


@pytest.mark.parametrize(
    ("how", "code", "says"), [("sleeps", HUNG, "nothing done in 1.5 s since step 41"), ("keeps the lock", 1, "Timeout")]
)
def test_a_hang_is_shown_and_ends_the_process(how, code, says):
    command = [sys.executable, "-c", HANG, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "in stuck" in done.stderr
    assert "went on" not in done.stdout


def test_what_moves_is_left_alone():
    command = [sys.executable, "-c", HANG, "petted"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr
