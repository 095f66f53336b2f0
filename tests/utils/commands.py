"""What the commands of python -m gem_fast must print and write."""

from gem_fast.paper.cli import main


def fails(capsys, arguments):
    """Runs arguments that must fail before any work; returns the one line that says why."""
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("python -m gem_fast")
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    return printed.err


def check_markdown(text: str) -> list[list[str]]:
    """A title, one table whose rows are as long as its head, and sentences; returns the rows."""
    lines = text.splitlines()
    assert lines[0].startswith("# ")
    table = [line for line in lines if line.startswith("|")]
    start = lines.index(table[0])
    assert lines[start - 1] == ""
    assert lines[start : start + len(table)] == table
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert set(rows[1]) == {"---"}
    assert {len(row) for row in rows} == {len(rows[0])}
    assert all(cell for row in rows for cell in row)
    return rows
