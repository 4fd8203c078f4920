"""Tables of text, .csv and .tsv: rows as dictionaries, by the names in the first line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from lorafit.data.source import LONGEST_LINE, DataSource, Fault
from lorafit.errors import RequestError

DELIMITERS = (",", ";", "\t", "|")


def read_table(
    source: DataSource, lines: Iterator[tuple[int, str]], fault: Fault
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of its last line, row) of a table.

    What stands between the columns is `source.delimiter`, or what a first line `sep=;` says, or what the
    names of the columns stand apart by. Rows of another width go to `fault`; rows of empty fields are
    given as they are. Raises RequestError for a table whose quotes do not match.
    """
    csv.field_size_limit(LONGEST_LINE)
    number, first = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if not first:
        return
    delimiter = source.delimiter
    if first.lower().startswith("sep=") and len(first) == 5:
        delimiter = delimiter or first[4]
        number, first = next(lines, (number, ""))
    delimiter = delimiter or _delimiter_of(first, "\t" if source.kind == "tsv" else ",")
    before = number - 1  # lines that the table does not count

    def text() -> Iterator[str]:
        yield first + "\n"
        yield from (line + "\n" for _, line in lines)

    quoting: Any = csv.QUOTE_MINIMAL if source.quote else csv.QUOTE_NONE
    table = csv.reader(
        text(), delimiter=delimiter, quotechar=source.quote or None, quoting=quoting, strict=True
    )
    try:
        header = [name.strip() for name in next(table, [])]
        while header and not header[-1]:  # a spreadsheet's empty columns
            header.pop()
        if not header:
            return
        header[0] = header[0] or UNNAMED  # pandas' index: a column without a name, before all others
        _check(header, f"{source.name}:{number}")
        for row in table:
            if not row:
                continue
            row = row[: len(header)] if not any(row[len(header) :]) else row
            if len(row) != len(header) and any(field.strip() for field in row):
                fault(
                    RequestError(
                        f"`{source.name}:{before + table.line_num}` has {len(row)} fields, "
                        f"and the first line names {len(header)}, separated by `{_shown(delimiter)}`",
                        "a field that holds a separator, a quote or a line break stands in quotes; "
                        "--csv-delimiter names another separator",
                    )
                )
                continue
            yield before + table.line_num, dict(zip(header, row, strict=len(row) == len(header)))
    except csv.Error as error:
        raise RequestError(
            f"`{source.name}:{before + table.line_num}` is not valid {source.kind.upper()}, "
            f"separated by `{_shown(delimiter)}`: {error}",
            "--csv-quote none reads quotes as text; --csv-delimiter names another separator",
        ) from None


def _delimiter_of(header: str, usual: str) -> str:
    """What stands between the names of the columns: the usual, unless only another is there."""
    outside = "".join(header.split('"')[::2])
    if usual in outside:
        return usual
    most = max(DELIMITERS, key=outside.count)
    return most if outside.count(most) else usual


def _shown(delimiter: str) -> str:
    return "\\t" if delimiter == "\t" else delimiter


UNNAMED = "(unnamed)"


def _check(header: list[str], where: str) -> None:
    """Raises RequestError for columns without a name, or two of one name."""
    odd = next((name for name in header if not name or header.count(name) > 1), None)
    if odd is not None:
        what = f"the column `{odd}` twice" if odd else "a column without a name"
        raise RequestError(f"`{where}` names {what}", "the first line names the columns, each once")
