"""Python interface: the names of `import minillm`, one process and several, and the notebook."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mpi_helpers import mpirun, needs_mpirun

import minillm
from minillm import generate
from minillm.base.errors import ConfigError, MinillmError

ROOT = Path(__file__).resolve().parents[2]
RUN = str(ROOT / "tests" / "checkpoint" / "saved_by_e77a9ad")
CELLS = [
    cell
    for cell in json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    if cell["cell_type"] == "code"
]
SCRIPT = """
import minillm
config = minillm.Config(data="austen", layers=1, heads=2, dim=16, context=16, batch=4, steps=6)
trainer = minillm.Trainer(config)
trainer.train(4)
trainer.train()
if trainer.comm.rank == 0:
    print(*trainer.losses)
"""


def test_the_names_are_documented_and_come_late() -> None:
    assert all(getattr(minillm, name).__doc__ for name in minillm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        minillm.Modle  # type: ignore[attr-defined]  # noqa: B018
    script = "import minillm, sys; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_load_writes_what_the_program_writes(capsys: pytest.CaptureFixture[str]) -> None:
    model = minillm.load(RUN)
    assert generate.main([RUN, "--prompt", "The", "--tokens", "30", "--seed", "3"]) == 0
    assert model.generate("The", 30, seed=3) + "\n" == capsys.readouterr().out
    whole = model.generate("The", 30, seed=3)
    assert (
        model.generate("The", 30, seed=3, stop=[whole[10:12]])
        == (whole[: whole.index(whole[10:12], 3)])
    )
    assert model.generate("The", 30, seed=3, stop=whole[10:12]) == model.generate(
        "The", 30, seed=3, stop=[whole[10:12]]
    )
    with pytest.raises(ConfigError, match="the prompt is empty"):
        model.generate("")


def test_several_prompts_give_the_texts_of_each() -> None:
    model, prompts = minillm.load(RUN), ["The", "Of a", "And", "It"]
    for options in ({"seed": 3, "top_p": 0.9}, {"beam": 3, "alpha": 0.6}, {"window": True}):
        alone = [model.generate(prompt, 20, **options) for prompt in prompts]
        assert model.generate(prompts, 20, batch=3, **options) == alone
    assert model.generate([]) == []
    with pytest.raises(ConfigError, match="'top_q'; did you mean top_"):
        model.generate("a", top_q=1)
    with pytest.raises(ConfigError, match="--beam 2 searches the likeliest text"):
        model.generate("a", beam=2, temperature=1.0)


def test_a_wrong_option_is_named() -> None:
    with pytest.raises(ConfigError, match="'layerz'; did you mean layers"):
        minillm.Config(layerz=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kernels": "matmul=nothing"}, "--kernels matmul=nothing: matmul has no implementation"),
        ({"memory": 0.001}, "the run needs .* but --memory gives this machine 1.0 MB"),
    ],
)
def test_a_trainer_heeds_the_options_of_the_computation(
    options: dict[str, Any], words: str
) -> None:
    config = minillm.Config(layers=1, heads=2, dim=16, context=16, batch=4, steps=6, **options)
    with pytest.raises(MinillmError, match=words):
        minillm.Trainer(config)


@needs_mpirun
@pytest.mark.slow
def test_one_process_and_two_have_the_same_losses(tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT, encoding="utf-8")
    one, two = (mpirun(number, [str(file)]) for number in (0, 2))
    assert one.returncode == two.returncode == 0, two.output
    losses = [[float(word) for word in found.output.split()] for found in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5) and len(losses[0]) == 6


def shown(cell: dict[str, Any]) -> str:
    """Return the output that the notebook shows below a cell."""
    return "".join(
        "".join(output.get("text") or output["data"]["text/plain"]) for output in cell["outputs"]
    )


@pytest.mark.slow
def test_the_notebook_shows_what_its_cells_print() -> None:
    scope: dict[str, Any] = {}
    numbers = re.compile(r"\d+(?:\.\d+)?")
    for cell in CELLS[:3]:
        printed = io.StringIO()
        source = "".join(cell["source"])
        with contextlib.redirect_stdout(printed):
            head, _, last = source.rpartition("\n")
            exec(source if not last.startswith("f") else f"{head}\nprint(repr({last}))", scope)
        found, wanted = printed.getvalue(), shown(cell)
        assert numbers.sub("#", found).strip() == numbers.sub("#", wanted).strip()
        pairs = zip(numbers.findall(found), numbers.findall(wanted), strict=True)
        assert all(abs(float(a) - float(b)) < 0.25 for a, b in pairs), found  # other processors
    text = scope["trainer"].model.generate("It was ", tokens=50, temperature=0.5)
    assert text.startswith("It was ") and len(text) == len(shown(CELLS[3])) - 1
