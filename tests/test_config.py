"""Configuration: presets, files and flags in their order, and sizes that follow.

Everything that cannot work gives one clear error.
"""

import dataclasses
import itertools
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from minillm.base.errors import ConfigError
from minillm.base.flags import parse_flags, read_toml, to_toml
from minillm.base.record import Record, divisors, flag, option, or_list
from minillm.layout.options import even_split
from minillm.models.gpt import ARCHITECTURE
from minillm.models.gpt_config import ModelConfig
from minillm.models.gpt_presets import PRESETS
from minillm.models.protocol import num_parameters
from minillm.training.arguments import StartOptions, parse_train_args
from minillm.training.config import RunConfig, check_resume, preset_values
from minillm.training.resolve import resolve, valid_layouts

SMALL: dict[str, Any] = dict(
    layers=2, heads=4, kv_heads=2, dim=32, ffn_dim=64, context=16, vocab=50
)


def preset(name: str, **changes: Any) -> RunConfig:
    return RunConfig.from_dict(preset_values(name) | changes)


def run_config(**values: Any) -> RunConfig:
    return RunConfig.from_dict(values)


def parse(*argv: str, **more: Any) -> RunConfig:
    return parse_train_args(argv, **more)[1]


def count(model: ModelConfig) -> int:
    return num_parameters(ARCHITECTURE, model)


# The model


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.439808),
        ("gpt2-medium", 354.823168),
        ("gpt2-large", 774.030080),
        ("gpt2-xl", 1557.611200),
    ],
)
def test_gpt2_presets_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    model = preset(name).shape.resolve()
    assert count(model) == round(millions * 1e6)
    assert (model.vocab, model.context, model.bias, model.tied) == (50257, 1024, "all", True)
    assert (model.kv_heads, model.ffn_dim) == (model.heads, 4 * model.dim)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("smollm2-135m", 134_515_008),
        ("llama3.2-1b", 1_235_814_400),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen3-0.6b", 596_049_920),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_presets_have_as_many_parameters_as_the_published_weights(name: str, number: int) -> None:
    assert count(preset(name).shape.resolve()) == number


def test_num_parameters_of_a_llama_counts_every_matrix() -> None:
    model = ModelConfig(
        **SMALL, norm="rmsnorm", mlp="swiglu", position="rotary", bias="none", tied=False
    )
    block = [
        (32, 32),
        (16, 32),
        (16, 32),
        (32, 32),
        (64, 32),
        (64, 32),
        (32, 64),
        (32,),
        (32,),
    ]  # q k v o, gate up down, two norms
    assert count(model) == 2 * sum(map(math.prod, block)) + 2 * 50 * 32 + 32
    assert model.head_width == 8


def test_num_parameters_of_biases_and_positions() -> None:
    plain = ModelConfig(**SMALL, bias="none", position="rotary")
    biased = dataclasses.replace(plain, bias="all")
    per_block = (32 + 16 + 16) + 32 + 64 + 32 + 2 * 32  # qkv, out, up, down, two norms
    assert count(biased) - count(plain) == 2 * per_block + 32
    assert count(dataclasses.replace(plain, position="learned")) - count(plain) == 16 * 32
    assert count(dataclasses.replace(plain, position="sinusoidal")) == count(plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(heads=5, kv_heads=5), ("--heads 5", "--dim 32", "4")),
        (dict(kv_heads=3), ("--kv-heads 3", "--heads 4", "1, 2 or 4")),
        (dict(heads=32, kv_heads=32, position="rotary"), ("rotary", "1 is odd", "--head-width 2")),
        (dict(position="rotary", head_width=5), ("5 is odd", "--head-width 6")),
        (dict(position="rotary", rope_share=0.4), ("--rope-share 0.4", "8 channels", "is 3")),
        (dict(position="rotary", rope_share=1.5), ("--rope-share 1.5", "from 2 to 8")),
        (dict(rope_scaling="linear"), ("--position rotary", "--position learned")),
        (dict(position="rotary", rope_scaling="linear"), ("--rope-factor 1",)),
        (dict(position="rotary", rope_factor=2.0), ("--rope-scaling none", "linear, llama3")),
        (dict(position="rotary", rope_low=2.0), ("--rope-low 2", "changes nothing")),
        (
            dict(position="rotary", rope_scaling="yarn", rope_factor=2.0),
            ("--rope-scaling yarn", "--rope-original"),
        ),
        (
            dict(
                position="rotary",
                rope_scaling="llama3",
                rope_factor=2.0,
                rope_original=8,
                rope_low=5.0,
            ),
            ("--rope-low 5", "--rope-high 4"),
        ),
        (dict(full_every=2), ("--full-every 2", "--window")),
        (dict(dropout=1.0), ("--dropout 1.0", "below 1")),
        (dict(dropout=-0.1), ("--dropout -0.1", "at least 0")),
        (dict(dropout=math.nan), ("--dropout nan",)),
        (dict(layers=0), ("--layers 0", "at least 1")),
        (dict(vocab=0), ("--vocab 0",)),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(**{**SMALL, **change})
    assert all(word in str(error.value) for word in words), error.value


def test_model_config_travels_as_plain_values() -> None:
    model = ModelConfig(**SMALL, mlp="relu")
    assert ModelConfig.from_dict(model.to_dict()) == model
    with pytest.raises(ConfigError, match="in the manifest: 'headz'; did you mean heads"):
        ModelConfig.from_dict({**model.to_dict(), "headz": 4}, "the manifest")


# Where values come from


def test_values_of_a_former_switch_are_read(tmp_path: Path) -> None:
    """Read --bias and bias = true, as they were before there were several kinds of biases."""
    file = tmp_path / "run.toml"
    file.write_text("bias = false\n")
    from_file = ("--config", str(file))
    for words, value in (
        (from_file, "none"),
        ((*from_file, "--bias", "--layers", "2"), "all"),
        ((*from_file, "--bias", "qkv"), "qkv"),
        (("--bias=qkv", "--no-bias"), "none"),
        (("--bias",), "all"),
    ):
        assert parse(*words).shape.bias == value
    assert RunConfig.from_dict({"bias": True}).shape.bias == "all"
    with pytest.raises(ConfigError, match="--bias maybe must be one of none, all, qkv"):
        parse("--bias", "maybe")


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('layers = 6\nkv-heads = 1\nmin_lr = 1\ntied = true\nnorm = "layernorm"\n')
    found = parse(
        *("--preset", "llama-tiny", f"--config={file}", "--layers", "8"),
        *("--no-bias", "--norm", "rmsnorm"),
    ).shape
    assert (found.layers, found.kv_heads, found.tied, found.norm, found.mlp, found.bias) == (
        *(8, 1, True),
        *("rmsnorm", "swiglu", "none"),
    )
    min_lr = parse("--config", str(file)).optimization.min_lr
    assert min_lr == 1.0 and isinstance(min_lr, float)


def test_three_state_flags_leave_the_preset_to_decide() -> None:
    assert parse().shape.tied is True
    assert parse("--preset", "llama-tiny").shape.tied is False
    assert parse("--preset", "llama-tiny", "--tied").shape.tied is True
    assert parse("--no-tied").shape.tied is False


def test_the_file_may_name_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('preset = "gpt2"\nlayers = 2\n')
    found = parse("--config", str(file)).shape
    assert (found.dim, found.layers) == (768, 2)
    assert parse("--config", str(file), "--preset", "nano").shape.dim == 128


def test_shakespeare_char_is_nanogpts_setting() -> None:
    found = preset("shakespeare-char").to_dict()
    setting = dict(layers=4, heads=4, dim=128, context=64, dropout=0.0, batch=12, steps=2000)
    setting |= dict(lr=1e-3, min_lr=1e-4, beta2=0.99, warmup=100, data="shakespeare")
    assert setting | dict(tokenizer="char") == {
        name: found[name] for name in (*setting, "tokenizer")
    }


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_on_one_and_on_four_ranks(name: str) -> None:
    for num_ranks in (1, 4):
        resolved = resolve(preset(name), num_ranks, vocab=65)
        mesh, batch = resolved.mesh, resolved.options.optimization.batch
        assert mesh.dp * mesh.tp * mesh.pp == num_ranks
        assert mesh.dp * resolved.microbatch * resolved.num_microbatches == batch


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--layerz", "3"], ("--layerz", "--layers")),
        (["--no-tide"], ("--no-tide", "--no-tied")),
        (["--preset", "nanno"], ("nanno", "nano")),
        (["--layers", "many"], ("--layers", "many")),
        (["--norm", "rmsnrom"], ("--norm rmsnrom", "layernorm, rmsnorm")),
        (["--layers"], ("--layers takes one value, not none",)),
        (["--layers", "3", "4"], ("--layers takes one value, not 3 4",)),
        (["--tied=yes"], ("'yes'",)),
        (["--cp", "2"], ("--cp 2", "context parallelism does not exist yet")),
        (["--ep=2"], ("--ep 2", "expert parallelism does not exist yet")),
        (["stray"], ("stray",)),
        (["--steps", "0"], ("--steps 0", "at least 1")),
        (["--lr", "nan"], ("--lr nan", "more than 0")),
        (["--lr", "inf"], ("--lr inf",)),
        (["--beta2", "1"], ("--beta2 1.0", "below 1")),
        (["--config", "/nowhere/run.toml"], ("/nowhere/run.toml", "No such file")),
    ],
)
def test_bad_flags_give_one_clear_error(
    argv: list[str], words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        parse_train_args(argv)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value) and "─" not in str(error.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layerz = 3", ("layerz", "layers", "run.toml")),
        ('layers = "three"', ("layers", "'three'", "int", "run.toml")),
        ("layers = true", ("layers", "True", "int")),
        ('norm = "batchnorm"', ("batchnorm", "layernorm, rmsnorm")),
        ("resume = 'runs/nano'", ("resume",)),
        ("layers = = 3", ("run.toml", "not TOML")),
        ("cp = 2", ("cp = 2", "run.toml", "context parallelism does not exist yet")),
        ("steps = -1", ("--steps -1",)),
        ('preset = "nanno"', ("nanno", "nano")),
    ],
)
def test_bad_files_give_one_clear_error(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parse_train_args(["--config", str(file)])
    assert all(word in str(error.value) for word in words), error.value


def test_every_option_has_a_sentence_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train_args(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in (*RunConfig.options(), *StartOptions.options()):
        after = text.partition(f"{flag(name)} ")[2] or text.partition(f"{flag(name)}, ")[2]
        sentence = after.partition("(default:")[0]
        assert sentence.rstrip().endswith(".") and len(sentence.split()) >= 4, (
            f"{name}: {sentence!r}"
        )


# Every flag that `python -m minillm.train --help` of commit e77a9ad prints, with a value.
FLAGS_OF_E77A9AD = """
    --preset=nano --layers=3 --heads=4 --dim=64 --context=32 --norm=rmsnorm --mlp=swiglu
    --position=rotary --bias --no-bias --dropout=0.1 --tied --no-tied --kv-heads=2 --ffn-dim=64
    --vocab=300 --data=austen --tokenizer=byte --batch=8 --steps=50 --lr=0.1 --min-lr=0.01
    --lr-schedule=linear --warmup=5 --weight-decay=0.2 --beta1=0.8 --beta2=0.9 --clip=0.5 --seed=1
    --dtype=float64 --dp=1 --tp=1 --pp=1 --schedule=gpipe --microbatch=2 --stage-layers=3
    --sequence-parallel --no-sequence-parallel --recompute=full --bucket-mb=2 --node-shared=off
    --kernels=numpy --device=cpu --out=runs/x --save-every=1 --keep=3 --eval-every=1
    --eval-tokens=1 --sample-tokens=0 --trace --no-trace --stop-after=3 --check-every=1
    --check-order --no-check-order --comm-timeout=9 --print-config --no-print-config
"""


def test_every_flag_of_an_earlier_version_still_parses() -> None:
    words = FLAGS_OF_E77A9AD.split()
    start, config = parse_train_args(words)
    assert not start.print_config
    values = config.to_dict()
    assert (values["min_lr"], values["bucket_mb"], values["stage_layers"]) == (0.01, 2.0, "3")
    defaults = RunConfig().to_dict()
    given = {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in words}
    assert {name for name in values.keys() & given if values[name] == defaults[name]} == {
        *("preset", "heads", "tp", "pp", "device", "trace", "sequence_parallel", "check_order"),
    }
    underscored = [word.replace("-", "_").replace("__", "--", 1) for word in words]
    assert parse_train_args(underscored)[1] == config


def test_other_programs_parse_through_the_same_door() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options(Record):
        """Say something."""

        text: str = "a"
        """Text to say."""

    assert parse_flags(Options, ["--text=--b"], prog="say").text == "--b"
    with pytest.raises(ConfigError, match="--text"):
        parse_flags(Options, ["--txet", "b"], prog="say")


# Printing and reading back


def test_printed_configuration_reads_back_to_the_same(tmp_path: Path) -> None:
    for name in PRESETS:
        changes = (
            dict(out='a "b"\\c\n\x7f \u00e9 \U0001f600', stop_after=5, lr=1e-05, stage_layers="3,1")
            if name == "nano"
            else {}
        )
        resolved = resolve(preset(name, **changes, pp=2 if changes else 1), 2, vocab=65)
        file = tmp_path / f"{name}.toml"
        file.write_text(to_toml(resolved.filled()), encoding="utf-8")
        again = parse("--config", str(file))
        assert again == resolved.filled()
        assert resolve(again, 2, vocab=65).filled() == resolved.filled()
        assert tomllib.loads(file.read_text(encoding="utf-8")) == read_toml(str(file))


@pytest.mark.parametrize("name", PRESETS)
def test_a_file_begun_with_a_printed_one_pins_nothing_that_follows(
    name: str, tmp_path: Path
) -> None:
    given = preset(name, batch=24)
    usual = {name: value for name, value in preset(name).to_dict().items() if name != "preset"}
    printed = to_toml(given, resolve(given, 1, vocab=65).filled(), usual)
    file = tmp_path / "run.toml"
    file.write_text(printed, encoding="utf-8")
    assert tomllib.loads(printed) == {"preset": name, "batch": 24}
    shown = {line.split(" = ")[0] for line in printed.replace("# ", "").splitlines()}
    assert {"ffn_dim", "min_lr", "warmup", "dp", "out", "microbatch", "layers"} <= shown
    assert parse("--config", str(file)) == given
    other = parse("--config", str(file), "--dim", "100800", "--lr", "0.01", "--steps", "3000")
    found = resolve(other, 2, vocab=65)
    assert found.min_lr == pytest.approx(1e-4 if name == "shakespeare-char" else 1e-3)
    widths = {"llama-tiny": 268800}  # a width that the preset sets does not follow
    width = PRESETS[name].get("ffn_dim", widths.get(name, 403200))
    assert (found.mesh.dp, found.model.ffn_dim) == (2, width)


def test_derived_numbers_are_printed_as_a_person_writes_them() -> None:
    printed = to_toml(run_config(lr=6e-4), resolve(run_config(lr=6e-4), 1, vocab=65).filled())
    assert "\nlr = 0.0006\n" in printed and "\n# min_lr = 6e-05\n" in printed


def test_a_file_may_have_tables(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        "steps = 7\n[model]\nlayers = 2\nkv-heads = 1\n[data]\ndata = 'austen'\n"
        "[output]\nkeep = 1\n"
    )
    found = parse("--config", str(file)).to_dict()
    wanted = dict(steps=7, layers=2, kv_heads=1, data="austen", keep=1)
    assert wanted == {name: found[name] for name in wanted}
    for text, words in (
        ("[modle]\nlayers = 2\n", "unknown table in .*'modle'; did you mean model"),
        ("[model]\nlayerz = 2\n", "'layerz'; did you mean layers"),
        ("layers = 1\n[model]\nlayers = 2\n", "layers stands twice"),
        ("zzzz = 1\n", "'zzzz'; the nearest are [a-z_]+, [a-z_]+ or [a-z_]+; minillm train --help"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            parse("--config", str(file))


def test_help_has_groups_with_an_example_each(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_train_args(["--help"])
    text = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    assert "(default: None)" not in text and "corpus" not in text
    parts = re.split(r" (\w+) options (?=-|[A-Z])", text)
    boxes = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(boxes) == {*RunConfig.titles(), "start"}
    for title, box in boxes.items():
        example = re.search(r"as in `(--[^`]+)`", box)
        assert example, title
        words = example[1].split()
        assert set(words[::2]) <= set(re.findall(r"--[a-z][\w-]*", box.replace(example[0], "")))
        if title != "start":
            parse_train_args(words)  # is a valid command


# What follows


def test_sizes_left_out_follow() -> None:
    resolved = resolve(run_config(batch=16, dim=96, steps=300, lr=3e-3), 4, vocab=256)
    found = resolved.filled().to_dict()
    follows = dict(dp=4, kv_heads=4, ffn_dim=384, vocab=256, microbatch=4, warmup=30)
    assert follows == {name: found[name] for name in follows}
    assert (resolved.num_microbatches, resolved.stage_layers) == (1, (4,))
    assert (found["stage_layers"], found["recompute"], found["out"]) == ("4", "none", "runs/nano")
    assert resolved.min_lr == found["min_lr"] == pytest.approx(3e-4)
    assert resolved.tokens_per_step == 16 * 128
    assert {name for name, value in found.items() if value is None} == {
        *("stop_after", "tokenizer", "log_to", "save_every", "val_data", "cache", "threads"),
        *("memory", "rope_local_base", "rope_original", "rope_low", "rope_high", "rope_attention"),
        *("slow_rank", "momentum", "freeze", "lora_alpha", "lora_targets", "patience"),
        "attention_scalar",
    }


def test_swiglu_width_is_two_thirds_rounded_up_to_64() -> None:
    widths = {
        dim: run_config(mlp="swiglu", dim=dim).shape.resolve(256).ffn_dim
        for dim in (96, 128, 768, 4096)
    }
    assert widths == {96: 256, 128: 384, 768: 2048, 4096: 10944}


@pytest.mark.parametrize(
    ("batch", "dp", "pp", "microbatch", "count"),
    [
        (16, 1, 1, 16, 1),
        (16, 2, 1, 8, 1),
        (16, 1, 2, 4, 4),
        (16, 1, 4, 2, 8),
        (12, 1, 2, 3, 4),
        (7, 1, 2, 1, 7),
        (2, 1, 4, 1, 2),
        (1, 1, 4, 1, 1),
    ],
)
def test_default_microbatch(batch: int, dp: int, pp: int, microbatch: int, count: int) -> None:
    resolved = resolve(run_config(batch=batch, dp=dp, pp=pp), dp * pp, vocab=256)
    assert (resolved.microbatch, resolved.num_microbatches) == (microbatch, count)


def test_even_split_is_even_with_the_larger_stages_inside() -> None:
    assert even_split(8, 4) == (2, 2, 2, 2)
    assert even_split(6, 4) == (1, 2, 2, 1)
    assert even_split(5, 4) == (1, 2, 1, 1)
    for total, parts in itertools.product(range(1, 20), range(1, 8)):
        sizes = even_split(total, parts)
        assert sum(sizes) == total and len(sizes) == parts and max(sizes) - min(sizes) <= 1


# Layouts


@pytest.mark.parametrize(
    ("options", "num_ranks", "words"),
    [
        (
            dict(tp=2),
            3,
            (
                "1 * 2 * 1 = 2",
                "3 ranks run",
                "mpirun -n 2",
                "for 3: --dp 1 --tp 1 --pp 3 --stage-layers 1,2,1",
            ),
        ),
        (dict(dp=4), 1, ("4 * 1 * 1 = 4", "1 rank runs", "mpirun -n 4", "--dp 1 --tp 1 --pp 1")),
        (dict(tp=5), 5, ("--heads 4", "--tp 5", "1, 2 or 4")),
        (dict(tp=4, ffn_dim=130), 4, ("--ffn-dim 130", "--tp 4")),
        (
            dict(tp=4, context=126, sequence_parallel=True),
            4,
            ("--context 126", "--tp 4", "--sequence-parallel"),
        ),
        (
            dict(pp=3),
            3,
            ("--layers 4", "--pp 3", "--stage-layers auto", "--stage-layers 1,2,1", "1, 2 or 4"),
        ),
        (dict(pp=5), 5, ("--pp 5", "--layers 4")),
        (dict(pp=2, stage_layers="3,2"), 2, ("3,2", "5", "--layers is 4", "2,2")),
        (dict(pp=2, stage_layers="1,2,1"), 2, ("3 stages", "--pp is 2", "--pp 3")),
        (dict(pp=2, stage_layers="4,0"), 2, ("'4,0'", "above 0")),
        (dict(pp=2, stage_layers="2;2"), 2, ("'2;2'",)),
        (dict(batch=10), 4, ("--batch 10", "dp = 4", "--batch 12", "--dp 1, 2, 5 or 10")),
        (
            dict(batch=16, microbatch=3),
            4,
            ("--batch 16", "dp = 4", "4 sequences", "--microbatch 3", "1, 2 or 4"),
        ),
        (dict(warmup=500), 1, ("--warmup 500", "--steps 400")),
        (dict(min_lr=1.0), 1, ("--min-lr 1.0", "--lr")),
        (dict(vocab=100), 1, ("--vocab 100", "256")),
    ],
)
def test_what_does_not_divide_is_refused_with_a_way_out(
    options: dict[str, Any], num_ranks: int, words: tuple[str, ...]
) -> None:
    settings: dict[str, Any] = {
        **dict(layers=4, heads=4, dim=128, context=128, batch=16, steps=400),
        **options,
    }
    with pytest.raises(ConfigError) as error:
        resolve(run_config(**settings), num_ranks, vocab=256)
    assert all(word in str(error.value) for word in words), error.value


def test_vocabulary_must_come_from_somewhere_and_need_not_divide() -> None:
    with pytest.raises(ConfigError, match="--vocab"):
        resolve(run_config(), 1)
    assert resolve(run_config(tp=2), 2, vocab=257).model.vocab == 257
    assert resolve(run_config(vocab=300), 1, vocab=256).model.vocab == 300


@pytest.mark.parametrize(
    "changes", [{}, dict(microbatch=2), dict(sequence_parallel=True, kv_heads=4, context=130)]
)
def test_valid_layouts_are_exactly_those_that_resolve(changes: dict[str, Any]) -> None:
    config = run_config(**{**dict(layers=3, heads=4, kv_heads=2, batch=12, context=128), **changes})
    model = config.shape.resolve(256)
    for num_ranks in (1, 2, 4, 6, 8, 12):
        fits = set()
        for dp, tp, pp in itertools.product(divisors(num_ranks), repeat=3):
            try:
                split = ",".join(map(str, even_split(3, pp))) if pp <= 3 else None
                resolve(
                    config.replace(dp=dp, tp=tp, pp=pp, stage_layers=split),
                    num_ranks,
                    vocab=256,
                )
                fits.add((dp, tp, pp))
            except ConfigError:
                pass
        assert set(valid_layouts(config, model, num_ranks)) == fits


# Resuming


def test_resume_starts_from_what_was_saved_and_layout_may_change(tmp_path: Path) -> None:
    saved = resolve(preset("llama-tiny", steps=50, tp=2), 4, vocab=256).saved_values()
    assert (
        saved["dp"] is None
        and saved["kv_heads"] == 2
        and saved["vocab"] == 256
        and saved["warmup"] is None
        and saved["out"] is None
    )
    start, config = parse_train_args(
        ["--resume", "runs/x", "--tp", "1", "--pp", "2", "--stop-after", "7"],
        saved=lambda path: saved,
    )
    values = config.to_dict()
    expected = dict(preset="llama-tiny", steps=50, mlp="swiglu", tp=1, pp=2, stop_after=7)
    assert start.resume == "runs/x"
    assert expected == {name: values[name] for name in expected}
    assert resolve(config, 8, vocab=256).mesh.dp == 4
    again = parse("--resume", "runs/x", "--steps", "500", saved=lambda start: saved)
    assert again.optimization.steps == 500
    assert (saved["warmup"], resolve(again, 8, vocab=256).warmup) == (None, 50)


@pytest.mark.parametrize(
    "argv",
    [
        ["--context", "64"],
        ["--beta1", "0.5"],
        ["--layers", "8"],
        ["--no-tied"],
        ["--seed", "1"],
        ["--preset", "gpt2"],
    ],
)
def test_resume_refuses_to_change_what_is_computed(argv: list[str]) -> None:
    saved = resolve(run_config(steps=50), 1, vocab=256).saved_values()
    with pytest.raises(ConfigError) as error:
        parse_train_args(["--resume", "runs/x", *argv], saved=lambda path: saved)
    assert (
        argv[0].replace("--no-", "--") in str(error.value)
        and "was" in str(error.value)
        and "--tp" in str(error.value)
    )


# What may differ between a run and its continuation: silently, and with a line.
SILENT = """
    dp tp pp schedule microbatch stage_layers sequence_parallel recompute bucket_mb node_shared
    kernels device out save_every save_async keep keep_best eval_every eval_tokens sample_tokens
    trace stop_after check_every check_order comm_timeout log_every log_to val_data cache threads
    memory zero shard_group balance servers slow_rank patience on_failure buddy buddy_every
    microbatch_tokens
"""
ANNOUNCED = """
    steps lr min_lr warmup lr_schedule clip batch dropout weight_decay data text_field
    decay_share cautious compress compress_rank compress_share local_steps outer_lr outer_momentum
    fragments server staleness layer_decay batch_tokens on_spike spike_window spike_threshold
    spike_limit
"""


def test_every_option_either_may_change_or_is_checked_on_resume() -> None:
    other: dict[str, Any] = dict(
        **dict(layers=8, heads=2, dim=64, context=64, norm="rmsnorm", mlp="relu"),
        **dict(position="rotary", bias="none", tied=False, kv_heads=2, ffn_dim=64, vocab=512),
        **dict(norm_place="post", norm_eps=1e-6, rope_base=1e6, rope_local_base=1e3),
        **dict(rope_share=0.5, rope_scaling="yarn", rope_factor=2.0, rope_original=64),
        **dict(rope_low=2.0, rope_high=16.0, rope_attention=1.5, qk_norm="head", window=9),
        **dict(full_every=2, embedding_scale=2.0, logit_cap=9.0, head_width=16),
        **dict(attention_cap=9.0, attention_scalar=2.0),
        **dict(preset="gpt2", tokenizer="char", beta1=0.5, beta2=0.5, seed=7, dtype="float64"),
        **dict(optimizer="sgd", momentum=0.5, muon_ratio="original", freeze="positions"),
        **dict(lora=4, lora_alpha=8.0, lora_targets="qkv"),
    )
    known = RunConfig.options()
    announced = set(ANNOUNCED.split())
    resumable = announced | set(SILENT.split())
    assert other.keys() | resumable | {"model"} == known.keys()  # tests/models/test_family.py
    assert {name for name in known if known[name].resumable} == resumable
    assert {name for name in known if known[name].announced} == announced
    config = run_config(vocab=256)
    check_resume(config.to_dict(), config)
    for name, value in other.items():
        with pytest.raises(ConfigError, match=f"{flag(name)} .*was"):
            check_resume({**config.to_dict(), name: value}, config)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dim", "64"], "--dim 64 (was 32)"),
        (["--preset", "llama-tiny", "--position", "rotary"], "--position rotary (was learned)"),
        (["--dtype", "float64"], "--dtype float64 (was float32)"),
        (["--tokenizer", "char"], "--tokenizer char (was None)"),
        (["--context", "17"], "--context 17 is longer than the 16 positions"),
    ],
)
def test_weights_refuse_another_model(argv: list[str], words: str) -> None:
    saved = resolve(run_config(**SMALL), 1).saved_values()
    with pytest.raises(ConfigError) as error:
        parse_train_args(["--init-from", "runs/x", *argv], saved=lambda start: saved)
    assert words in str(error.value)


def test_weights_bring_their_model_and_text_and_nothing_else() -> None:
    settings = SMALL | dict(position="rotary", lr=0.5, steps=7, batch=3, data="austen", seed=5)
    saved = resolve(run_config(**settings), 1).saved_values()
    config = parse("--init-from", "x", "--context", "32", "--lr", "0.1", saved=lambda start: saved)
    fresh, found = preset("nano").to_dict(), config.to_dict()
    expected = fresh | SMALL | dict(position="rotary", data="austen", lr=0.1, context=32)
    expected["head_width"] = SMALL["dim"] // SMALL["heads"]
    assert found == expected


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--resume", "x", "--init-from", "y"], "use one of them"),
        (["--best"], "--best goes with --init-from"),
        (["--out", ""], "--out '' is empty"),
        (["--resume", ""], "--resume '' is empty"),
        (["--data", ""], "--data '' is empty"),
        (["--tokenizer", ""], "--tokenizer '' is empty"),
        (["--out", "~nosuchuser/x"], "unknown user"),
        (["--save-every", "10x"], "--save-every 10x"),
        (["--save-every", "-5"], "--save-every -5"),
    ],
)
def test_starts_that_make_no_sense_are_refused(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(*argv)
    assert words in str(error.value)


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words, saved = ["--out=~/x", "--resume", "~/y", "--data", "~/z.txt"], RunConfig().to_dict()
    start, config = parse_train_args(words, saved=lambda start: saved)
    home = str(tmp_path)
    assert (config.output.out, start.resume) == (f"{home}/x", f"{home}/y")
    assert config.corpus.data == f"{home}/z.txt"
    assert parse("--out", "./~x").output.out == "./~x"


def test_a_file_of_a_text_editor_on_windows_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(b"\xef\xbb\xbfsteps = 5\r\n")
    assert parse("--config", str(file)).optimization.steps == 5


@pytest.mark.parametrize(("text", "value"), [("save_every = 5", 5), ('save-every = "2h"', "2h")])
def test_save_every_reads_steps_and_times(tmp_path: Path, text: str, value: int | str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    config = parse("--config", str(file))
    assert config.output.save_every == value == parse("--save-every", str(value)).output.save_every
    assert parse().output.save_every is None
    file.write_text("save_every = 1.5")
    with pytest.raises(ConfigError, match="must be of type int or str"):
        parse("--config", str(file))


def test_or_list_and_divisors() -> None:
    assert (or_list([1]), or_list([1, 2]), or_list([1, 2, 3])) == ("1", "1 or 2", "1, 2 or 3")
    assert (divisors(1), divisors(12), divisors(16)) == ([1], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16])


# A new subsystem


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions(Record):
    """Toy subsystem."""

    toy_level: int = option(2, at_least=1, below=5)
    """Level of the toy, which changes what is computed."""
    toy_speed: float | None = option(None, above=0, resumable=True)
    """Speed of the toy in units a second."""
    toy_loud: bool = option(False, resumable=True)
    """Make the toy loud while it runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyRun(RunConfig):
    """Train with a toy."""

    toy: ToyOptions = dataclasses.field(default=ToyOptions())


def toy(*argv: str, **more: Any) -> ToyRun:
    return parse_train_args(argv, cls=ToyRun, **more)[1]


def test_a_room_adds_its_flags_by_one_field(capsys: pytest.CaptureFixture[str]) -> None:
    found = toy("--toy-level", "3", "--toy-loud", "--layers", "2", "--preset", "gpt2")
    assert (found.toy, found.shape.layers, found.shape.dim) == (
        ToyOptions(toy_level=3, toy_loud=True),
        2,
        768,
    )
    assert list(found.to_dict()) == [*RunConfig().to_dict(), "toy_level", "toy_speed", "toy_loud"]
    with pytest.raises(SystemExit):
        toy("--help")
    assert "Speed of the toy in units a second." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--toy-level", "5"], "--toy-level 5 must be at least 1 and below 5"),
        (["--toy-level", "low"], "--toy-level low must be of type int"),
        (["--toy-speed", "0"], "--toy-speed 0.0 must be more than 0"),
        (["--toy-levle", "3"], "--toy-levle.*--toy-level"),
    ],
)
def test_a_room_holds_its_own_bounds(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        toy(*argv)
    with pytest.raises(ConfigError, match="unknown flag"):
        parse(*argv)


def test_a_room_reads_files_and_resumes(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("toy-level = 4\ntoy_speed = 2\n")
    found = toy("--config", str(file), "--toy-speed", "3")
    assert found.toy == ToyOptions(toy_level=4, toy_speed=3.0)
    resolved = resolve(found, 1, vocab=256)
    assert "toy_level = 4\n" in to_toml(resolved.filled())
    saved = resolved.saved_values()
    again = toy("--resume", "runs/x", "--toy-speed", "7", saved=lambda path: saved)
    assert again.toy == ToyOptions(toy_level=4, toy_speed=7.0)
    with pytest.raises(ConfigError, match=r"--toy-level 3 \(was 4\).*--toy-speed"):
        toy("--resume", "runs/x", "--toy-level", "3", saved=lambda path: saved)


def test_two_rooms_cannot_share_a_name() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Double(RunConfig):
        more: ToyOptions = dataclasses.field(default=ToyOptions())
        toy: ToyOptions = dataclasses.field(default=ToyOptions())

    with pytest.raises(TypeError, match="toy_level"):
        Double.options()
