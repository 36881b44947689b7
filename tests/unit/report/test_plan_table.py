"""The text block that says what a run will do."""

from trainwright.report.plan_table import MAX_WIDTH, plan_table


def test_values_start_in_one_column() -> None:
    lines = plan_table([("samples", "12"), ("total batch", "64"), ("x", "y")]).splitlines()
    assert lines == ["  samples      12", "  total batch  64", "  x            y"]


def test_a_long_value_continues_below_its_own_column_and_stays_whole() -> None:
    words = " ".join(f"word{index}" for index in range(60))
    lines = plan_table([("what", words)]).splitlines()
    assert len(lines) > 1 and all(len(line) <= MAX_WIDTH for line in lines)
    assert all(line.startswith(" " * len("  what  ")) for line in lines[1:])
    assert " ".join(" ".join(lines).split()) == f"what {words}"


def test_a_path_is_never_broken() -> None:
    path = "/some/very-long-path/" * 10
    assert path in plan_table([("output", f"checkpoints into {path}")])


def test_line_breaks_and_blank_rows_are_kept() -> None:
    assert plan_table([("a", "1\n2"), ("", ""), ("b", "3")]).splitlines() == ["  a  1", "     2", "", "  b  3"]


def test_no_rows_give_no_text() -> None:
    assert plan_table([]) == ""
