"""The progress of a run on the console: a bar, or lines."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class TrainProgress(Progress):
    """A progress bar on a terminal; otherwise about `LINES` lines per run."""

    LINES = 20

    def __init__(self, start: int, steps: int, console: Console):
        columns = ("[bold]train", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        super().__init__(*columns, *times, console=console, disable=not console.is_terminal)
        self.bar = self.add_task("train", total=steps, completed=start, text="")
        self.began, self.first, self.steps, self.every = time.perf_counter(), start, steps, max(1, steps // self.LINES)

    def show(self, line: dict) -> None:
        """Shows the metrics of a step."""
        step = line["step"]
        text = f"loss {line['loss']:.4f}  {line['tokens_per_s']:,.0f} tokens/s"
        text += f"  {line['tflops_per_device']:,.4g} TFLOP/s per device"
        if line["mfu"] is not None:
            text += f" ({line['mfu']:.1%} of peak)"
        self.update(self.bar, completed=step, text=text)
        if not (self.console.quiet or self.console.is_terminal) and (step % self.every == 0 or step == self.steps):
            left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
            print(f"step {step}/{self.steps}  {text}  {left:.0f} s left", file=sys.stdout, flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)
