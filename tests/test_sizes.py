"""Numbers of any length, and files of any kind behind --config, end in one line."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from minillm.base.errors import ConfigError
from minillm.base.flags import read_toml
from minillm.base.record import divisors
from minillm.layout.options import LayoutOptions
from minillm.training.arguments import parse_train_args
from minillm.training.config import RunConfig


def digits(number: int) -> str:
    return "1" * number


@pytest.mark.parametrize("number", [20, 300, 4300, 5000])
@pytest.mark.parametrize("flag", ["--seed", "--steps", "--batch", "--dim", "--stage-layers"])
def test_numbers_of_any_length_are_one_short_line(flag: str, number: int) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag} ") as caught:
        config = parse_train_args([flag, digits(number)])[1]
        config.layout.resolve_stage_layers(4, lambda: [1] * 4)
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [10**20, 10**5000, -(1 << 63)], ids=["20", "5000", "negative"])
def test_numbers_beyond_63_bits_are_refused(value: int) -> None:
    with pytest.raises(ConfigError, match=r"^seed = [^']*less than 2\^63"):
        RunConfig().replace(seed=value)
    with pytest.raises(ConfigError, match=r"^lr = [^']*less than 2\^63"):
        RunConfig.from_dict({"lr": value})
    assert RunConfig().replace(seed=(1 << 63) - 1).optimization.seed == (1 << 63) - 1


def test_large_numbers_are_divided_at_once() -> None:
    started = time.perf_counter()
    assert divisors(10**18)[:6] == [1, 2, 4, 5, 8, 10]
    with pytest.raises(ConfigError, match="--heads 7 does not divide"):
        RunConfig().replace(dim=10**18, heads=7).shape.resolve(29)
    assert time.perf_counter() - started < 5
    assert divisors(12) == [1, 2, 3, 4, 6, 12] and divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_stage_layers_are_read_as_before() -> None:
    assert LayoutOptions(pp=2, stage_layers="1, 3").resolve_stage_layers(4, lambda: [1] * 4) == (
        1,
        3,
    )
    with pytest.raises(ConfigError, match=r"adds up to 11, but --layers is 4"):
        LayoutOptions(pp=2, stage_layers="1,10").resolve_stage_layers(4, lambda: [1] * 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("layers = " + "[" * 100_000, "is not TOML: maximum recursion depth"),
        (f"seed = {digits(5000)}", "is not TOML: Exceeds the limit"),
        ("# " + "x" * 2_000_000, "is not TOML: it is longer than 1000 kB"),
        (b"\xff\xfe\x00", "is not TOML: Invalid statement"),
        ("layers == 2", "is not TOML"),
    ],
    ids=["brackets", "digits", "size", "bytes", "syntax"],
)
def test_bad_configs_are_one_line(content: str | bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        parse_train_args(["--config", str(file)])
    assert f"--config {file} {words}" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_devices_and_marks_of_byte_order_are_no_trouble(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 1000 kB"):
        read_toml("/dev/zero")
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xef\xbb\xbflayers = 2\n")
    assert read_toml(str(file)) == {"layers": 2}


def test_an_unknown_key_is_not_answered_with_all_names(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("zzzzqqqq = 2\n")
    with pytest.raises(ConfigError, match=r"unknown option in .*'zzzzqqqq'; .*--help") as caught:
        parse_train_args(["--config", str(file)])
    assert len(str(caught.value)) < 300
    file.write_text("laiers = 2\n")
    with pytest.raises(ConfigError, match="did you mean layers"):
        parse_train_args(["--config", str(file)])


def test_microbatch_is_a_number_or_auto() -> None:
    assert parse_train_args(["--microbatch", "auto"])[1].pipeline.microbatch == "auto"
    assert parse_train_args(["--microbatch", "4"])[1].pipeline.microbatch == 4
    for bad in ("aut", "0", "1.5"):
        with pytest.raises(ConfigError, match=rf"--microbatch {bad} must be "):
            parse_train_args(["--microbatch", bad])
    assert RunConfig.from_dict({"microbatch": "auto"}).pipeline.microbatch == "auto"
