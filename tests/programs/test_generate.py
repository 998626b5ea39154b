"""`minillm generate`: prompts, samples, stop texts, and output that nothing can break."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mpi_helpers import Launch, environment, mpirun, needs_mpirun

from minillm import generate
from minillm.base.errors import ConfigError

RUN = str(Path(__file__).parents[1] / "checkpoint" / "saved_by_e77a9ad")
WHOLE = ["--tokens", "6", "--temperature", "0"]  # the likeliest text: the same on every layout


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Iterator[object]:
    def program(*argv: str, status: int = 0) -> str:
        assert generate.main([RUN, *argv]) == status
        return "".join(capsys.readouterr())

    yield program


def typed(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Pipe `text` into standard input."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    monkeypatch.setattr(sys, "stdin", open(reading, encoding="ascii"))  # noqa: SIM115


def test_the_run_may_be_the_first_word(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--prompt", "The", *WHOLE) == run("--prompt=The", *WHOLE)
    with pytest.raises(ConfigError, match=r"--checkpoint must be given"):
        generate._parse(["--prompt", "The"])


def test_a_prompt_may_look_like_a_flag(run) -> None:  # type: ignore[no-untyped-def]
    assert run("--prompt", "--foo", *WHOLE).startswith("--foo")
    assert run("--prompt", "", *WHOLE, status=1).startswith("error: --prompt '' is empty")
    assert generate._parse(["run", "--stop", "--a", "--stop=-", "--stop", "b c"]).stop == (
        *("--a", "-"),
        "b c",
    )


def test_each_piped_line_is_a_prompt(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    typed(monkeypatch, "Thé\n\nOf ".encode())
    texts = run(*WHOLE).split("\n---\n")
    assert len(texts) == 2 and texts[0].startswith("Thé") and texts[1].startswith("Of ")
    typed(monkeypatch, b"One\nTwo\n")
    assert run("--prompt", "-", *WHOLE).startswith("One\nTwo")
    typed(monkeypatch, b"One\nTwo\n")
    assert run("--prompt", "here", *WHOLE).startswith("here")  # what is piped stays unread
    typed(monkeypatch, b"")
    assert run(*WHOLE).startswith("\n")
    typed(monkeypatch, b"\xff\n")
    assert run(*WHOLE, status=1).startswith("error: standard input is not UTF-8")


def test_each_line_of_a_file_is_a_prompt(
    run,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffThé\r\n\n Of the \r\nA".encode())  # as an editor on Windows writes it
    texts = run("--prompts", str(file), "--samples", "2", "--tokens", "6", "--batch", "4")
    assert texts.count("\n---\n") == 5
    for number, prompt in enumerate(("Thé", " Of the ", "A")):
        alone = run("--prompt", prompt, "--samples", "2", "--tokens", "6")
        assert (
            f"{texts}---\n".split("\n---\n")[2 * number :][:2]
            == (f"{alone}---\n".split("\n---\n")[:2])
        )
    typed(monkeypatch, b"The\nA\n")
    assert run("--prompts", "-", *WHOLE).count("\n---\n") == 1


def test_a_file_without_prompts_is_named(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "prompts.txt"
    for content, words in (
        (b"", f"--prompts {file} holds no prompt: 0 characters, and no line with text"),
        (b" \n\n", f"--prompts {file} holds no prompt: 3 characters, and no line with text"),
        (b"a\n\xff", f"--prompts {file} is not UTF-8 text: "),
    ):
        file.write_bytes(content)
        assert run("--prompts", str(file), status=1).startswith(f"error: {words}")
    missing = tmp_path / "none.txt"
    assert run("--prompts", str(missing), status=1) == (
        f"error: --prompts {missing} cannot be read: No such file or directory\n"
    )


def test_a_full_context_ends_a_text_and_says_so(run) -> None:  # type: ignore[no-untyped-def]
    text = run("--prompt", "The", "--tokens", "20", "--temperature", "0")
    note = "note: 1 text ended where the context of 16 tokens was full; --window goes on"
    assert text.index(note) <= 3 + 14 + 1 + 3 * 14  # bytes that are no character take three
    longer = run("--prompt", "The", "--tokens", "20", "--temperature", "0", "--window")
    assert "note" not in longer and longer.startswith(text[:10])


def test_samples_have_seeds_of_their_own(run) -> None:  # type: ignore[no-untyped-def]
    three = run("--prompt", "The", "--samples", "3", "--seed", "4", "--tokens", "9")
    each = [run("--prompt", "The", "--seed", str(4 + i), "--tokens", "9") for i in range(3)]
    assert three == "---\n".join(each) and len(set(each)) == 3


def test_impossible_requests_are_refused() -> None:
    for words, message in (
        (["--samples", "2", "--temperature", "0"], "the same text each time"),
        (["--interactive", "--prompt", "a"], "leave --prompt out"),
        (["--stop", ""], "--stop .*is empty"),
        (["--top-p", "2"], "--top-p 2 must"),
        (["--samples", "2", "--beam", "4"], "the same text each time"),
        (["--beam", "4", "--top-k", "3"], "without chance; leave --temperature, --top-k"),
        (["--alpha", "0.6"], "belong to a beam search; add --beam 5"),
        (["--prompts", "f", "--prompt", "a"], "--prompts f and --prompt both give prompts"),
        (["--prompts", "f", "--interactive"], "--prompts f and --interactive both"),
    ):
        with pytest.raises(ConfigError, match=message):
            generate._parse(["run", *words])


def test_the_text_ends_before_a_stop_text(run) -> None:  # type: ignore[no-untyped-def]
    text = run("--prompt", "The", "--tokens", "60", "--window")[3:]
    stop = text[20:22]
    assert run("--prompt", "The", "--tokens", "60", "--window", "--stop", stop)[3:] == (
        text[: text.index(stop)] + "\n"
    )


def test_a_prompt_that_is_cut_says_so(run) -> None:  # type: ignore[no-untyped-def]
    assert "note: the prompt has 17 tokens, and the context is 16; the model reads the last 8" in (
        run("--prompt", "a" * 17, *WHOLE)
    )
    assert "the model reads" not in run("--prompt", "a" * 16, *WHOLE)


def test_a_bad_prompt_does_not_end_the_loop(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(sys, "stdin", io.StringIO("The\n\ud800\nOf"))
    texts = run("--interactive", *WHOLE)
    assert texts.startswith("The") and "\nOf" in texts and "error: the text has U+D800" in texts


def test_any_encoding_of_the_output_will_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "minillm.generate", RUN, "--prompt", "é€", *WHOLE],
        env=environment({"PYTHONIOENCODING": "ascii"}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.startswith(b"\\xe9\\u20ac"), done


def test_a_reader_may_leave() -> None:
    command = [sys.executable, "-m", "minillm.generate", RUN, "--window", "--tokens=100000"]
    program = Launch(command, stderr=subprocess.PIPE, text=False)
    assert program.stdout is not None and program.stderr is not None
    assert len(program.stdout.read(20)) == 20  # long before the last token
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait(60) == 141


def test_a_terminal_gets_no_control_characters_and_a_prompt_loop() -> None:
    command = [sys.executable, "-m", "minillm.generate", RUN, "--interactive", "--temperature=9"]
    terminal, follower = pty.openpty()
    ends = dict(stdin=follower, stdout=follower, stderr=follower)
    program = Launch([*command, "--window", "--tokens=100000"], **ends)
    os.close(follower)
    seen = b""

    def wait_for(text: bytes, size: int = 0) -> None:
        nonlocal seen
        while text not in seen or len(seen) < size:
            seen += os.read(terminal, 4096)

    try:
        wait_for(b"> ")
        os.write(terminal, b"The\n")
        wait_for(b"The\r\nThe", 600)
        program.send_signal(signal.SIGINT)  # ends the text, not the loop
        wait_for(b"\r\n> ")
        os.write(terminal, b"\x04")
        assert program.wait(60) == 0
    finally:
        os.close(terminal)
    shown = seen[seen.index(b"The\r\nThe") : seen.rindex(b"\r\n> ")]
    assert not set(shown) & ({*range(32), 127} - set(b"\r\n\t"))
    assert b"\\x" in shown  # a model that has learnt nothing writes them


@needs_mpirun
@pytest.mark.slow
def test_replicas_share_the_samples() -> None:
    argv = ["-m", "minillm.generate", RUN, "--prompt", "The", "--samples", "3", "--tokens", "12"]
    one, two = mpirun(0, argv), mpirun(4, [*argv, "--tp", "2"])
    assert one.returncode == two.returncode == 0, two.output
    shown = generate.printable(one.output)  # under a launcher, whose pipe may be a terminal
    assert two.output == shown and shown.count("\n---\n") == 2


def test_a_closed_standard_input_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert generate.main([RUN, "--prompt", "-"]) == 1
    wanted = "error: standard input is closed; give the text with --prompt\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--temperature", "-1"], "--temperature -1 must be at least 0"),
        (["--top-k", "-2"], "--top-k -2 must be at least 0"),
        (["--top-p", "3"], "--top-p 3 must be above 0 and at most 1"),
        (["--top-p", "nan"], "--top-p nan must be above 0 and at most 1"),
    ],
)
def test_the_option_out_of_range_is_named_alone(
    words: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([RUN, *words]) == 1
    assert capsys.readouterr().err == f"error: {wanted}\n"


def test_a_file_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert generate.main([str(tmp_path / "metrics.jsonl")]) == 1
    assert "metrics.jsonl is a file; pass the folder of a run" in capsys.readouterr().err
