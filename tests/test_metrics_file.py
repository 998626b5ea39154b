"""Metrics file: it survives interruptions, removal and lines of other programs."""

import json
import os
from pathlib import Path

import pytest

from minillm.base.errors import MinillmError
from minillm.base.metrics_file import MetricsFile, copy_later, keep_until, steps_of


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *steps: int) -> None:
    file = MetricsFile(path)
    for step in steps:
        file.write(step=step, loss=1.0)
    file.sync()
    file.close()


def test_a_resumed_run_drops_the_steps_it_does_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3)
    path.write_text(path.read_text() + '{"step": 4, "lo')  # cut off by a crash
    keep_until(2, path, path)
    write(path, 3)
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_lines_of_others_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = b'12\n"a"\n[1]\n{"step": null}\n{}\n\xff\xfe\n' + b"[" * 100_000 + b"\n"
    path.write_bytes(b'{"step": 1}\n' + odd + b'{"step": 2}\n{"step": true}\n{"step": 3}')
    assert [step for step, _ in steps_of(path)] == [1, 2, 3]
    keep_until(9, path, path)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert list(steps_of(tmp_path / "none")) == []


def test_later_lines_are_added_to_those_left_before(tmp_path: Path) -> None:
    path, left = tmp_path / "metrics.jsonl", tmp_path / "left.jsonl"
    write(path, 1, 2, 3)
    assert copy_later(1, path, left) == 2
    assert copy_later(2, path, left) == 1
    assert copy_later(3, path, left) == 0
    assert [line["step"] for line in lines(left)] == [2, 3, 3]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_removed_during_the_run_goes_on_in_a_new_one(replaced: bool, tmp_path: Path) -> None:
    path, said = tmp_path / "metrics.jsonl", []
    file = MetricsFile(path, said.append)
    file.write(step=1)
    path.rename(tmp_path / "moved")
    if replaced:
        path.write_text('{"step": 0}\n')
    file.write(step=2)
    file.write(step=3)
    assert [line["step"] for line in lines(path)] == [*([0] if replaced else []), 2, 3]
    assert len(said) == 1 and "removed or replaced" in said[0]


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)
    for attempt in (lambda: keep_until(1, path, path), lambda: MetricsFile(path)):
        with pytest.raises(MinillmError, match="is not a regular file"):
            attempt()
    folder = tmp_path / "run"
    folder.mkdir()
    gone = MetricsFile(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    folder.rmdir()
    with pytest.raises(MinillmError, match=r"No such file.*--resume when that is repaired"):
        gone.write(step=1)
    gone = MetricsFile(tmp_path / "a")
    (tmp_path / "a").unlink()
    (tmp_path / "a").mkdir()
    with pytest.raises(MinillmError, match="is not a regular file"):
        gone.write(step=1)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    file = MetricsFile(None)
    file.write(step=1)
    file.sync()
    file.close()
