"""Train in processes on this machine's CPU (gloo): ``python scripts/train_processes.py 2 tiny --cpu-devices 4``.

The first argument is the number of processes; each runs train.py with the others. Exits with the first nonzero code.
"""

import signal
import socket
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Starts the processes, forwards signals, waits for all."""
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal() or int(sys.argv[1]) < 1:
        print(f"error: usage: {sys.argv[0]} PROCESSES CONFIG [--flag value ...]", file=sys.stderr)
        return 2
    count = int(sys.argv[1])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = ["--cluster.launcher", "explicit", "--cluster.coordinator", f"localhost:{port}"]
    cluster += ["--cluster.num-processes", str(count), "--cluster.process-id"]
    train = [sys.executable, str(Path(__file__).with_name("train.py")), *sys.argv[2:], *cluster]
    # in sessions of their own, so that Ctrl-C does not reach them a second time from the terminal
    processes = [subprocess.Popen([*train, str(rank)], start_new_session=True) for rank in range(count)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: [process.send_signal(number) for process in processes])
    return next(filter(None, [process.wait() for process in processes]), 0)


if __name__ == "__main__":
    sys.exit(main())
