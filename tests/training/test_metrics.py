"""metrics.jsonl: every step has one line, whatever happens to the disk, the file or its folder."""

import errno
import json
import os
import shutil

import pytest

from tests.builders.fuzz import check_door
from tsp_jax.training.metrics import MetricsFile, read_metrics
from tsp_jax.training.safety.finite import NumbersWatch


def step_line(step: int) -> dict:
    return {"step": step, "loss": 3.0 - step / 10, "grad_norm": 1.0, "tokens_per_s": 1e3}


def text_of(*steps: int) -> str:
    return "".join(json.dumps(step_line(step)) + "\n" for step in steps)


def steps_of(path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


class Disk:
    """A disk that may be full: it takes five more bytes and then nothing."""

    def __init__(self, monkeypatch):
        self.full, self.sync_fails, self.free = False, False, 5
        write, sync = os.write, os.fsync

        def limited_write(file, data):
            if not self.full:
                return write(file, data)
            if not self.free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.free -= 5
            return write(file, data[:5])

        def limited_sync(file):
            if self.sync_fails:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(file)

        monkeypatch.setattr(os, "write", limited_write)
        monkeypatch.setattr(os, "fsync", limited_sync)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "metrics.jsonl"


# ------------------------------------------------------------------------------------------------ full disks


def test_lines_wait_for_a_full_disk(path, disk):
    said = []
    metrics = MetricsFile(path, 0, said.append)
    for step in range(1, 7):
        disk.full = 2 <= step < 5
        metrics.write(step_line(step))
    metrics.close()
    assert path.read_text() == text_of(*range(1, 7))
    assert len(said) == 1
    assert "No space left on device" in said[0]


@pytest.mark.parametrize("until", ["end", "never"])
def test_lines_that_wait_at_the_end_are_written_or_said_one_by_one(until, path, disk):
    said = []
    metrics = MetricsFile(path, 0, said.append)
    for step in range(1, 7):
        disk.full = step >= 3
        metrics.write(step_line(step))
    disk.full = until == "never"
    metrics.close()
    if until == "never":
        assert [json.loads(text[text.index("{") :]) for text in said[1:]] == [step_line(step) for step in range(3, 7)]
        assert all(str(path) in text for text in said)
    else:
        assert path.read_text() == text_of(*range(1, 7))
        assert len(said) == 1


def test_lines_that_wait_at_a_save_are_given_to_the_checkpoint_and_back(path, disk):
    metrics = MetricsFile(path, 0, lambda text: None)
    for step in range(1, 7):
        disk.full = step >= 3
        metrics.write(step_line(step))
    waiting = metrics.sync()
    assert waiting == text_of(*range(3, 7))
    (path.parent / "saved").write_text(waiting)
    disk.full = False  # and the process is killed here
    resumed = MetricsFile(path, 5, saved=path.parent / "saved")
    resumed.write(step_line(6))
    resumed.close()
    assert path.read_text() == text_of(*range(1, 7))


def test_lines_that_a_disk_takes_and_then_loses_are_written_again(path, disk):
    """Network file systems and delayed allocation report a full disk when a file is flushed."""
    said = []
    metrics = MetricsFile(path, 0, said.append)
    metrics.write(step_line(1))
    assert metrics.sync() == ""
    metrics.write(step_line(2))
    disk.sync_fails = True
    assert metrics.sync() == text_of(2)
    disk.sync_fails = False
    os.truncate(path, len(text_of(1)) + 3)
    assert metrics.sync() == ""
    assert path.read_text() == text_of(1, 2)
    assert len(said) == 1


def test_a_run_resumes_on_a_full_disk(path, disk, monkeypatch):
    path.write_text(text_of(1, 2) + "damage\n" + text_of(3, 4))
    monkeypatch.setattr("tsp_jax.training.metrics.write_atomically", no_space)
    disk.full = True
    metrics = MetricsFile(path, 3, lambda text: None)
    metrics.write(step_line(4))
    assert steps_of(path)[:2] == [1, 2], "what was on disk stays there"
    disk.full = False
    metrics.close()
    assert path.read_text() == text_of(1, 2, 3, 4)


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# ------------------------------------------------------------------------------------------------ files that vanish


VANISH = {
    "file removed": lambda path: path.unlink(),
    "file renamed": lambda path: path.rename(path.with_name("elsewhere")),
    "file emptied": lambda path: path.write_text(""),
    "file copied over": lambda path: (shutil.copy(path, f"{path}2"), os.replace(f"{path}2", path)),
    "folder removed": lambda path: shutil.rmtree(path.parent),
    "folder renamed": lambda path: path.parent.rename(path.parent.with_name("elsewhere")),
}


@pytest.mark.parametrize("case", VANISH)
def test_a_file_that_vanishes_while_training_is_written_anew(case, path):
    said = []
    metrics = MetricsFile(path, 0, said.append)
    for step in range(1, 7):
        metrics.write(step_line(step))
        if step == 3:
            VANISH[case](path)
    metrics.close()
    assert path.read_text() == text_of(*range(1, 7))
    assert len(said) == (0 if case in ("file emptied", "file copied over") else 1)


@pytest.mark.parametrize("other", ["file", "folder", "fifo"])
def test_what_stands_in_place_of_the_file_is_not_touched(other, path):
    said = []
    metrics = MetricsFile(path, 0, said.append)
    metrics.write(step_line(1))
    path.unlink()
    {"file": lambda: path.write_text(text_of(7)), "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[other]()
    metrics.write(step_line(2))
    metrics.close()
    assert [json.loads(text[text.index("{") :]) for text in said[1:]] == [step_line(1), step_line(2)]
    assert other != "file" or path.read_text() == text_of(7)


# ------------------------------------------------------------------------------------------------ damaged files


DAMAGE = {
    "a number": b"7",
    "null": b"null",
    "a list": b"[1]",
    "no step": b'{"loss": 1.0}',
    "a step of text": b'{"step": "2"}',
    "a negative step": b'{"step": -2}',
    "a step too large": b'{"step": 1' + b"0" * 400 + b"}",
    "a loss of text": b'{"step": 2, "loss": "low"}',
    "a loss of NaN": b'{"step": 2, "loss": NaN}',
    "bytes that are no UTF-8": b'{"step": 2, "loss": "\xff"}',
    "nested deeply": b'{"step":' * 100_000,
    "NUL bytes": b"\0" * 50,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_lines_are_left_out_and_said(case, path):
    path.write_bytes(text_of(1).encode() + DAMAGE[case] + b"\n" + text_of(2, 3).encode())
    said = []
    metrics = MetricsFile(path, 3, said.append)
    metrics.close()
    assert path.read_text() == text_of(1, 2, 3)
    assert [line["step"] for line in metrics.earlier] == [1, 2, 3]
    assert len(said) == 1
    assert "1 line of" in said[0]


def test_steps_without_a_line_are_said(path):
    path.write_text(text_of(2, 3, 6) + "damage\n" + text_of(9))
    said = []
    MetricsFile(path, 5_000_000_000, said.append).close()
    assert "steps 1, 4-5, 7-8, 10-5000000000" in said[-1]


def test_a_step_has_one_line(path):
    path.write_text(text_of(1, 2, 2) + '{"step": 2, "eval_loss": 1.0}\n' + text_of(3, 2))
    MetricsFile(path, 3).close()
    assert path.read_text() == text_of(1, 2) + '{"step": 2, "eval_loss": 1.0}\n' + text_of(3)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link to /dev/zero", "dangling link"])
def test_what_is_not_a_regular_file_is_put_aside(kind, path):
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if "zero" in kind else "nowhere")
    said = []
    metrics = MetricsFile(path, 0, said.append)
    metrics.write(step_line(1))
    metrics.close()
    assert path.read_text() == text_of(1)
    assert kind == "dangling link" or ("metrics.jsonl.damaged" in said[0] and len(said) == 1)


def test_a_line_cut_short_and_later_lines_are_dropped_on_resume(path):
    path.write_text(text_of(1, 2, 3) + '{"ste')
    said = []
    metrics = MetricsFile(path, 2, said.append)
    metrics.write(step_line(3))
    metrics.close()
    assert path.read_text() == text_of(1, 2, 3)
    assert said == []


@pytest.mark.soak
def test_no_metrics_file_prevents_resuming(path):
    """A fuzz; a regular file of any content is read."""

    def resume(content: bytes) -> None:
        path.write_bytes(content)
        metrics = MetricsFile(path, 4, lambda text: None)
        NumbersWatch(3, metrics.earlier, lambda text: None)
        metrics.close()
        assert all(line["step"] <= 4 for line in read_metrics(path))

    whole = text_of(1, 2) + '{"step": 2, "eval_loss": 1.0}\n' + text_of(3, 4, 5)
    check_door(resume, [whole.encode(), text_of(3).encode(), b'{"step": 2, "eval_loss": null}\n'], allowed=())
