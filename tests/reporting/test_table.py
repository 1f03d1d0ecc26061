from rich.box import ASCII
from rich.console import Console

from lowlevel.table import TextTable, table_of


def test_words_stand_left_numbers_right_and_a_line_where_a_row_is_missing(capsys) -> None:
    Console(width=40).print(table_of(("<name", "ms"), [("a", "1.5"), None, ("whole", "12.25")], box=ASCII))
    assert capsys.readouterr().out.split("\n")[1:-2] == [
        "| name  |    ms |",
        "|-------+-------|",
        "| a     |   1.5 |",
        "|-------+-------|",
        "| whole | 12.25 |",
    ]


def test_the_first_columns_of_a_table_of_texts_are_words(capsys) -> None:
    rows = [("a", "bb", "1.5"), ("cc", "d", "12.25")]
    TextTable("a title", ("run", "task", "value"), rows, "a note", alarms=["too [low]"]).show(Console(width=40))
    shown = capsys.readouterr().out
    assert "│ cc  │ d    │ 12.25 │" in shown
    assert "│ a   │ bb   │   1.5 │" in shown
    assert shown.endswith("\nalarm: too [low]\n")
