"""Damaged checkpoints are refused, and an older one is offered."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_helpers import rewrite_manifest, small_run

from minillm import checkpoint
from minillm.base.errors import CheckpointError
from minillm.checkpoint import CheckpointSource, Piece, TensorEntry
from minillm.checkpoint.manifest import check_coverage
from minillm.comm.communicator import Communicator
from minillm.comm.threads import run_ranks


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"runs/none does not exist"):
        checkpoint.find(Path("runs/none"))
    with pytest.raises(
        CheckpointError,
        match=r"no checkpoint in .*looked for folders like step-00000100 .*manifest\.json",
    ):
        checkpoint.find(tmp_path)


def test_run_folder_checkpoints_folder_and_step_folder_are_found(tmp_path: Path) -> None:
    paths = small_run(tmp_path / "checkpoints", 90, 100)
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == paths[1]
    assert checkpoint.find(paths[0]) == paths[0]
    renamed = paths[0].rename(tmp_path / "best")
    assert checkpoint.find(renamed) == renamed


def truncate(path: Path) -> None:
    with (path / "rank-00001.safetensors").open("r+b") as stream:
        stream.truncate(40)


def remove(path: Path) -> None:
    (path / "rank-00001.safetensors").unlink()


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def truncate_manifest(path: Path) -> None:
    file = path / "manifest.json"
    file.write_text(file.read_text()[:-30])


def alter_manifest(path: Path) -> None:
    file = path / "manifest.json"
    text = file.read_text()
    assert '"step": 30' in text
    file.write_text(text.replace('"step": 30', '"step": 31'))


def foreign_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"weights": [1, 2]}')


def binary_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes(bytes(range(256)))


def later_version(path: Path) -> None:
    rewrite_manifest(path, lambda body: body.update(version=2))


def escaping_file(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["files"].update({"../x": {"size": 1, "sha256": ""}}))


def lost_piece(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["tensors"]["cut"]["pieces"].pop())


def doubled_piece(path: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        pieces = body["tensors"]["cut"]["pieces"]
        pieces[1]["slices"] = pieces[0]["slices"]

    rewrite_manifest(path, change)


def moved_piece(path: Path) -> None:
    """Move a piece by one row: the counts of elements still fit, a row is in no piece."""

    def change(body: dict[str, Any]) -> None:
        body["tensors"]["cut"]["pieces"][1]["slices"][0] = [2, 5]

    rewrite_manifest(path, change)


def infinite_step(path: Path) -> None:
    rewrite_manifest(path, lambda body: body.update(step=float("inf")))


def infinite_bound(path: Path) -> None:
    def change(body: dict[str, Any]) -> None:
        body["tensors"]["cut"]["pieces"][1]["slices"][0][1] = float("inf")

    rewrite_manifest(path, change)


def truth_as_size(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["tensors"]["cut"].update(shape=[True, 24]))


def lone_surrogate(path: Path) -> None:
    rewrite_manifest(path, lambda body: body.update(meta={"key": "\ud800"}))


def deep_brackets(path: Path) -> None:
    (path / "manifest.json").write_text("[" * 100_000)


def fifo(path: Path) -> None:
    remove_manifest(path)
    os.mkfifo(path / "manifest.json")


def endless_link(path: Path) -> None:
    remove_manifest(path)
    (path / "manifest.json").symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    os.truncate(path / "manifest.json", 8_000_000_000)


def missing_field(path: Path) -> None:
    rewrite_manifest(path, lambda body: body["tensors"]["cut"].pop("shape"))


DAMAGES = {
    truncate: r"rank-00001\.safetensors is truncated or altered: it has 40 bytes instead of \d+",
    remove: r"rank-00001\.safetensors is missing",
    remove_manifest: r"manifest\.json is missing, so the checkpoint was never completed",
    truncate_manifest: r"manifest\.json is truncated or altered",
    alter_manifest: r"manifest\.json was altered",
    foreign_manifest: r"manifest\.json is not the manifest of a minillm checkpoint",
    binary_manifest: r"manifest\.json is truncated or altered",
    later_version: r"format version 2, but this minillm reads version 1",
    escaping_file: r"leads out of the folder",
    lost_piece: r"the pieces of cut have 12 elements, but shape \(6, 4\) has 24",
    doubled_piece: r"two pieces of cut overlap: \(\(0, 3\), \(0, 4\)\) and \(\(0, 3\), \(0, 4\)\)",
    moved_piece: r"two pieces of cut overlap: \(\(0, 3\), \(0, 4\)\) and \(\(2, 5\), \(0, 4\)\)",
    missing_field: r"malformed: KeyError: 'shape'",
    infinite_step: r"malformed: ValueError: inf is no count",
    infinite_bound: r"malformed: ValueError: inf is no count",
    truth_as_size: r"malformed: ValueError: True is no count",
    lone_surrogate: r"manifest\.json is truncated or altered: .*'\\ud800'",
    deep_brackets: r"manifest\.json is truncated or altered: maximum recursion depth",
    fifo: r"manifest\.json cannot be read: it is not a regular file",
    endless_link: r"manifest\.json cannot be read: it is not a regular file",
    sparse: r"manifest\.json cannot be read: it has 8000000000 bytes, more than any manifest",
}


# Written never, or not to its end: no checkpoint any more.
UNFINISHED = (remove_manifest, truncate_manifest, binary_manifest, deep_brackets)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_refused_and_an_older_one_offered(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    paths = small_run(tmp_path, 10, 20, 30)
    truncate(paths[1])  # the one before is no good either
    damage(paths[2])
    for asked in (tmp_path, paths[2]):
        found = truncate if asked == tmp_path and damage in UNFINISHED else damage
        with pytest.raises(CheckpointError, match=DAMAGES[found]) as caught:
            checkpoint.find(asked)
        assert f"An older complete checkpoint is {paths[0]}" in str(caught.value)
    assert checkpoint.find(paths[0]) == paths[0]

    def rank(comm: Communicator) -> str:
        with pytest.raises(CheckpointError, match=DAMAGES[damage]) as caught:
            checkpoint.verify(paths[2], comm)
        return str(caught.value)

    assert len(set(run_ranks(3, rank))) == 1


def test_pieces_that_touch_do_not_overlap() -> None:
    """Check that a grid of 3 x 4 blocks passes, and that any block moved by one is found."""
    grid = [((2 * i, 2 * i + 2), (3 * j, 3 * j + 3)) for i in range(3) for j in range(4)]

    def entry(bounds: list[Any]) -> dict[str, TensorEntry]:
        return {"w": TensorEntry((6, 12), "float32", tuple(Piece(b, "f", "k") for b in bounds))}

    check_coverage(entry(grid))
    check_coverage(entry([*grid, ((3, 3), (0, 12))]))  # empty pieces overlap nothing
    for at, ((first, last), columns) in enumerate(grid):
        step = 1 if last < 6 else -1
        moved = ((first + step, last + step), columns)
        with pytest.raises(ValueError, match="two pieces of w overlap"):
            check_coverage(entry([*grid[:at], moved, *grid[at + 1 :]]))


@pytest.mark.parametrize("name", ["config", "tokenizer", "vocab", "corpus", "source", "key"])
def test_a_record_of_wrong_types_is_refused(name: str, tmp_path: Path) -> None:
    good: dict[str, Any] = dict(config={}, tokenizer={}, vocab=9, corpus="", source="", key={})
    (path,) = small_run(tmp_path, 10, meta=good)
    assert checkpoint.RunRecord.read(path).vocab == 9
    for value in ([1], None, True):
        rewrite_manifest(path, lambda body, value=value: body["meta"].update({name: value}))
        with pytest.raises(CheckpointError, match=rf"minillm\.train: {name} in its manifest is a"):
            checkpoint.RunRecord.read(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab", -1),
        ("vocab", 1 << 63),
        ("position", -1),
        ("stopping", {"step": "x", "waited": 0}),
        ("stopping", {"step": 1}),
        ("stopping", {"step": 1, "waited": 0, "best": "x"}),
        ("stopping", {"step": 1, "waited": 0, "best": None}),
    ],
)
def test_a_record_of_wrong_numbers_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    good: dict[str, Any] = dict(config={}, tokenizer={}, vocab=9, corpus="", source="", key={})
    (path,) = small_run(tmp_path, 10, meta=good | {"stopping": {"step": 1, "waited": 0}})
    assert checkpoint.RunRecord.read(path).stopping == {"step": 1, "waited": 0}
    rewrite_manifest(path, lambda body: body["meta"].update({name: value}))
    with pytest.raises(CheckpointError, match=r"minillm\.train: \w+ in its manifest is"):
        checkpoint.RunRecord.read(path)


def test_folders_that_cannot_be_read_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read: File name too long"):
        checkpoint.find(tmp_path / ("x" * 300))
    (path,) = small_run(tmp_path, 10)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)  # root may read everything
    with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied"):
        checkpoint.find(tmp_path)


def test_a_flipped_byte_in_any_file_is_found_by_all_ranks(tmp_path: Path) -> None:
    (path,) = small_run(tmp_path, 10, num_ranks=4)
    run_ranks(3, lambda comm: checkpoint.verify(path, comm))

    def rank(comm: Communicator, name: str) -> str:
        with pytest.raises(
            CheckpointError, match=rf"{name} was altered.*no older complete checkpoint"
        ) as caught:
            checkpoint.verify(path, comm)
        return str(caught.value)

    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        intact = file.read_bytes()
        file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        assert checkpoint.find(tmp_path) == path  # sizes alone do not show it
        for num_ranks in (1, 3, 6):
            assert (
                len(set(run_ranks(num_ranks, lambda comm, name=file.name: rank(comm, name)))) == 1
            )
        file.write_bytes(intact)


def test_a_file_damaged_after_the_check_is_still_an_error(tmp_path: Path) -> None:
    """Check that damage between `find` and `load` raises CheckpointError.

    One file gets an invalid header. Reads that need the other file alone still succeed.
    """
    first, second = small_run(tmp_path, 10, 20)
    source = CheckpointSource(second)
    (second / "rank-00001.safetensors").write_bytes(b"\xff" * 300)
    with pytest.raises(
        CheckpointError, match=rf"rank-00001\.safetensors cannot be read.*{first.name}"
    ):
        source.read("cut", (slice(0, 6), slice(0, 4)))
    np.testing.assert_array_equal(
        source.read("cut", (slice(0, 3), slice(1, 2))), np.full((3, 1), 20)
    )  # only the other file is needed
