"""The README's commands are the ones that run, and what it names exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minillm.__main__ import PROGRAMS
from minillm.base.record import flag
from minillm.models.family import families
from minillm.tasks.objectives import objective
from minillm.training.arguments import StartOptions
from minillm.training.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def extracted(name: str) -> str:
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "readme_command"), name],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.rstrip("\n")


@pytest.mark.parametrize(
    ("name", "position", "end"),
    [("train", 0, "mpirun -n 4 python -m minillm.train"), ("test", 1, "pytest")],
)
def test_both_commands_are_complete_and_ci_extracts_them(
    name: str, position: int, end: str
) -> None:
    command = BLOCKS[position].strip()
    steps = [step.strip() for step in command.split("&&")]
    assert steps[-1] == end
    assert steps[:2] == ["python3 -m venv .venv", ". .venv/bin/activate"]
    assert re.fullmatch(r"pip install -e '\.\[mpich(,test)?\]'", steps[2])
    assert len(steps) == 4 and "\n" not in command
    assert extracted(name) == command


def test_both_commands_stand_on_the_first_screen() -> None:
    first_screen = "\n".join(README.splitlines()[:24])
    assert all(block in first_screen for block in BLOCKS[:2])


def test_ci_runs_the_extracted_test_command_last() -> None:
    lines = [
        line
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    assert "command=$(python3 .ci/readme_command test)" in lines
    assert lines[-1] == 'bash -euo pipefail -c "$command"'
    assert "set -euo pipefail" in lines


def test_train_flags_in_the_readme_exist() -> None:
    options = {**RunConfig.options(), **StartOptions.options()}
    for family in families().values():
        options |= {**family.options.options(), **objective(family.objective).options.options()}
    known = {flag(name) for name in options}
    known |= {flag(f"no_{name}") for name in options if options[name].kind is bool}
    lines = [
        line.partition("#")[0]
        for block in BLOCKS
        for line in block.splitlines()
        if "minillm.train" in line
    ]
    used = {
        word
        for line in lines
        for word in re.findall(r"(?<=\s)--[a-z][\w-]*", line.partition("minillm.train")[2])
    }
    assert len(used) >= 8
    assert used <= known
    inline = set(re.findall(r"`(--[a-z][\w-]*)`", README))
    assert inline <= known


def test_programs_in_the_readme_exist() -> None:
    named = set(re.findall(r"python -m minillm\.(\w+)", README)) | set(
        re.findall(r"`?minillm (\w+)(?=`| 1f1b)", README)
    )
    assert {"train", "evaluate", "generate", "schedule", "doctor"} <= named <= set(PROGRAMS)


def test_links_and_files_in_the_readme_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) >= 8
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
