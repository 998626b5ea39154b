"""Lines of the log: numbers, times and paragraphs."""

from minillm.base.log import clock, compact, fitted, paragraph


def test_numbers_and_times_read_well() -> None:
    assert [compact(number) for number in (7, 999.4, 12345, 1234567, 2.5e9)] == [
        "7",
        "999",
        "12.3k",
        "1.23M",
        "2.5G",
    ]
    assert [clock(seconds) for seconds in (0, 5.4, 75, 3661)] == ["0:00", "0:05", "1:15", "1:01:01"]


def test_a_paragraph_is_80_columns_wide_and_its_lines_begin_below_one_another() -> None:
    lines = paragraph("plan", "twelve words of text " * 8 + "runs/" + "x" * 90).splitlines()
    assert [line[:8] for line in lines] == ["plan    ", *["        "] * (len(lines) - 1)]
    assert max(map(len, lines[:-1])) <= 80 and lines[-1] == " " * 8 + "runs/" + "x" * 90
    assert " ".join(line[8:] for line in lines).startswith("twelve words of text twelve words")


def test_fields_that_do_not_fit_are_left_out_from_the_end() -> None:
    fields = ["step 1", "loss 2.5", "1k tokens/s"]
    assert [fitted(fields, width) for width in (3, 15, 16, 29)] == [
        "step 1",
        "step 1",
        "step 1  loss 2.5",
        "step 1  loss 2.5  1k tokens/s",
    ]
