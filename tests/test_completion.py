"""Completion scripts: a shell offers programs, flags and values."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from minillm.launch import completion

from minillm.__main__ import PROGRAMS
from minillm.finetune import TASKS, finetune_args
from minillm.models.family import families
from minillm.training.config import RunConfig, preset_values


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert completion.main([shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.slow
def test_bash_offers_programs_flags_and_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "minillm.sh"
    file.write_text(script("bash", capsys), encoding="utf-8")
    lines = [
        "minillm ge",
        "minillm emu",
        "minillm train --lay",
        "minillm train --norm rm",
        "minillm train --resu",
        "minillm generate --inter",
        "minillm verify --compare",
        "minillm schedule --svg",
        "minillm train --model bert --mask-s",
        "minillm train --model seq2seq --label-smo",
        "minillm finetune --task classify --pro",
        "minillm evaluate --met",
    ]
    tries = "\n".join(f"try {line}" for line in lines)
    shell = """
        source "$1"
        wanted=$(complete -p minillm | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $wanted; echo "${COMPREPLY[0]}"; }
    """
    done = subprocess.run(
        ["bash", "-c", shell + tries, "bash", str(file)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == [
        *("generate", "emulator", "--layers", "rmsnorm", "--resume"),
        *("--interactive", "--compare-steps", "--svg"),
        *("--mask-share", "--label-smoothing", "--problem", "--metric"),
    ], done


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_program_and_flag(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(shell, capsys)
    assert all(name in text for name in (*PROGRAMS, "--preset", "--samples", "Width of the model."))
    if shutil.which(shell):
        file = tmp_path / "minillm"
        file.write_text(text, encoding="utf-8")
        subprocess.run([shell, "-n", str(file)], check=True, timeout=60)


def test_flags_of_every_family_and_task_are_known() -> None:
    known = {name: set(cls.options()) for name, cls in completion.OPTIONS.items()}
    for name in families():
        assert known["train"] >= {*RunConfig.of(name).options(), "resume", "init_from"}
    for task in TASKS:
        assert known["finetune"] >= set(finetune_args(task).options())
    assert known["evaluate"] >= {"checkpoint", "source", "hypotheses", "data"}
    assert known["predict"] >= {"checkpoint", "input"}
    objectives = completion.OPTIONS["train"].options()["objective"].kind
    assert "mlm+nsp" in str(objectives), "choices of every family"


@pytest.mark.parametrize("task", TASKS)
def test_help_of_a_task_shows_the_values_of_its_presets(task: str) -> None:
    """Compare the defaults with both presets, and find the flags that begin a run."""
    for tuned, preset in ((False, TASKS[task].scratch), (True, TASKS[task].tuned)):
        shown = finetune_args(task, tuned)().to_dict()
        expected = preset_values(preset)
        assert {name: shown[name] for name in expected.keys() & shown.keys() - {"model"}} == {
            name: value for name, value in expected.items() if name not in ("model", "preset")
        }
        assert {"resume", "config", "print_config"} <= shown.keys() and "init_from" not in shown


def test_every_program_is_known() -> None:
    assert {*completion.OPTIONS, *completion.OTHERS} == set(PROGRAMS)


def test_an_unknown_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert completion.main(["bahs"]) == 1
    assert "did you mean bash" in capsys.readouterr().err
    assert completion.main(["--help"]) == 0
    assert 'eval "$(minillm completion bash)"' in capsys.readouterr().out
