"""Tables fit the terminal, and everything in them stays whole."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from dylo_moe.utils.table import PART, Table

NAMES = [
    "python_code_instructions_18k",
    "flytech/python-codes-25k",
    "evol_instruct_code_80k",
    "magicoder_oss_instruct_75k",
    "数据集_代码",
    "my",
]
HUGE = [f"{value:,}" for value in range(1_234_567_890, 1_234_567_896)]
ESTIMATE = ("-12.345", "[-14.000, -10.345]")


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table, crop=False)
    return console.file.getvalue().splitlines()


def tables():
    by_row = Table("title of the table", ["dataset", "rows read", "share", "the base", "the model", "difference", "of"])
    by_column = Table("title of the table", ["", *NAMES])
    words = Table("title of the table", ["expert", "parameters", "what it knows"], words=["what it knows"])
    for name, huge in zip(NAMES, HUGE, strict=True):
        by_row.add_row(name, huge, "12.3%", ESTIMATE, ESTIMATE, ESTIMATE, f"{huge} documents")
        words.add_row(Text(name), huge, "; ".join(f"{other}: {huge}" for other in NAMES), style="bold")
    for label in ("in another dataset", "question held out"):
        by_column.add_section()
        by_column.add_row(label, *HUGE)
    return {"by row": by_row, "by column": by_column, "words": words}


@pytest.mark.parametrize("width", [60, 80, 120, 400])
@pytest.mark.parametrize("kind", ["by row", "by column", "words"])
def test_no_line_is_too_long_and_no_number_or_part_of_a_name_is_cut(kind, width):
    lines = printed(tables()[kind], width)
    assert max(map(cell_len, lines)) <= width
    text = "\n".join(lines)
    estimates = ESTIMATE if kind == "by row" else ()
    cells = [*HUGE, *estimates, *(part.strip() for name in NAMES for part in PART.findall(name))]
    assert [cell for cell in cells if cell not in text] == []
    assert "…" not in text
    if width == 400:
        assert [name for name in NAMES if name not in text] == []


def test_every_column_is_printed_once_behind_the_names_of_its_rows():
    blocks = tables()["by column"].blocks(60)
    assert len(blocks) > 1
    assert [place for block in blocks for place in list(block)[1:]] == [1, 2, 3, 4, 5, 6]
    assert all(0 in block for block in blocks)


def test_what_fits_no_terminal_is_longer_than_the_line_instead_of_cut():
    assert any(HUGE[0] in line for line in printed(tables()["by row"], 12))


def test_a_row_of_other_columns_is_refused():
    with pytest.raises(ValueError, match="the row has 1 cell; the table has 2 columns"):
        Table("title", ["a", "b"]).add_row("1")
