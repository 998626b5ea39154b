"""Bars of long work: silent if it is short, lines where there is no terminal."""

import pytest

from minillm.base import bar as module
from minillm.base.bar import bar


@pytest.mark.parametrize(("delay", "shown"), [(0.0, True), (0.0, False), (9.0, True)])
def test_without_a_terminal_a_bar_is_lines_on_standard_error(
    delay: float,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "terminals", lambda: (None, None))
    monkeypatch.setattr(module, "DELAY", delay)
    monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
    with bar("tokenizing", 4_000_000, "char", shown) as advance:
        for _ in range(4):
            advance(1_000_000)
    out, err = capsys.readouterr()
    assert not out and "\r" not in err and bool(err) == (shown and not delay)
    if err:
        lines = err.splitlines()
        assert all(line.startswith("tokenizing: ") and len(line) <= 72 for line in lines)
        assert any(" 50%|" in line and "2.00M/4.00M" in line for line in lines)
