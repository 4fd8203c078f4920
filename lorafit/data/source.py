"""One file, or one hub set, that rows are read from; what is done with a row that cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from lorafit.errors import RequestError

LONGEST_LINE = 32_000_000  # bytes of one example: more is a file that was meant otherwise


KINDS = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".jsonlines": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text",
    ".md": "text", ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip


PACKED = (".gz", ".zst")


def kind_of(path: Path) -> tuple[str, str]:
    """(the kind of file that a name says, its compression)."""
    packed = path.suffix.lower() if path.suffix.lower() in PACKED else ""
    name = path.with_suffix("") if packed else path
    kind = KINDS.get(name.suffix.lower(), "")
    return ("" if packed and kind in ("parquet", "arrow") else kind), packed


Tick = Callable[[int], None]


Fault = Callable[[RequestError], None]


def refuse(error: RequestError) -> None:
    """What is done with a bad row where nobody collects them."""
    raise error


@dataclass(frozen=True, slots=True)
class DataSource:
    """One file, or one hub set: where its rows are read."""

    name: str
    kind: str
    path: Path | None = None
    packed: str = ""  # `.gz` or `.zst`
    delimiter: str = ""  # of a table's columns; empty: found in its first line
    quote: str = '"'  # around a table's fields; empty: there are none

    @property
    def is_text(self) -> bool:
        """Whether its name is that of a text file, whatever it is read as."""
        return self.path is not None and kind_of(self.path)[0] == "text"

    @property
    def is_table(self) -> bool:
        """Whether its rows all have the same columns, filled with nulls."""
        return self.kind in ("parquet", "arrow", "hub")

    def as_kind(self, kind: str) -> DataSource:
        """The same file, read as another kind."""
        return replace(self, kind=kind)

    @property
    def bytes(self) -> int:
        """The size of the file; 0 for a hub set."""
        return self.path.stat().st_size if self.path else 0

    def where(self, number: int) -> str:
        """How a row is named: by line where a line is a row."""
        if self.kind in ("jsonl", "csv", "tsv", "text"):
            return f"{self.name}:{number}"
        return f"{self.name}[{number}]"
