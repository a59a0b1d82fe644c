"""The notebooks of examples/: they run, and the answers to their exercises."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

ANSWERS = """
# 1: bytes of tsp, 3 x 2 F D, against those of two all-reduces, 2 x 2 T D, each times 4 (R - 1) / R
print(next(tokens for tokens in range(10_000) if 4 * tokens * D >= 6 * F * D), 3 * F // 2)

# 2: both weights are fetched twice, and their gradients sent once, in a message for each bucket
print([messages for messages, _ in moved.values()])
BUCKETS = 8
doubled = received(compiled(tsp).as_text())
print([messages for messages, _ in doubled.values()], [doubled[kind][1] == moved[kind][1] for kind in moved])

# 3: hidden columns of a bucket, [T / R, F / BUCKETS], are as many then as a device's tokens
print(largest_buffers(tsp, number=1))
check(tsp)
"""


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tsp_from_scratch_and_its_answers():
    example = (ROOT / "examples" / "tsp_from_scratch.py").read_text()
    *_, first, second, third, fourth = printed(example + ANSWERS)
    assert first == "768 768"
    assert second == "[16, 8]"
    assert third == "[32, 16] [True, True]"
    assert fourth == "[((128, 64), 32)]"
