"""Rows written with a run, and read back."""

import numpy as np
import pytest

from lorafit.data.rows import IGNORED, Row, RowSet, read_rows, save_rows


def some(count: int, shift: int = 0) -> list[Row]:
    return [
        Row(
            (1, n + shift, 7)[: 2 + n % 2],
            (IGNORED, n + shift, 7)[: 2 + n % 2],
            f"place {n}",
            n + 1,
            n,
            n % 3,
            n,
        )
        for n in range(count)
    ]


def test_rows_come_back_in_their_order_with_their_sources(tmp_path):
    first, second = RowSet.of(some(5)), RowSet.of(some(4, 50))
    stores = (
        type(first.stores[0]).__mro__[1]("a.jsonl", True, first.stores[0].arrays),
        type(first.stores[0]).__mro__[1]("owner/set:train", False, second.stores[0].arrays),
    )
    rows = RowSet(stores, np.array([7, 0, 3, 8, 1]))
    save_rows(rows, tmp_path / "rows.safetensors")
    (tmp_path / "plain").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1, "others may read it too"
    back = read_rows(tmp_path / "rows.safetensors")
    assert list(back) == list(rows) and back.digest == rows.digest
    assert list(back.origins()) == list(rows.origins())
    assert [row.where for row in back] == [
        "owner/set:train[3]",
        "a.jsonl:1",
        "a.jsonl:4",
        "owner/set:train[4]",
        "a.jsonl:2",
    ]


def test_what_is_not_such_a_file_is_refused(tmp_path):
    from safetensors.numpy import save_file

    save_file({"ids": np.zeros(3, dtype=np.int32)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="format"):
        read_rows(tmp_path / "x.safetensors")


def test_a_run_keeps_what_it_held_out_and_pushes_none_of_it(tiny, pairs, tmp_path, run):
    from fnmatch import fnmatch

    from lorafit.hub import KEPT_BACK

    assert run("train", tiny("llama"), "--data", pairs, "--max-steps", 1, "-o", tmp_path / "r").code == 0
    stored = read_rows(tmp_path / "r" / "held-out.safetensors")
    before = run("eval", tmp_path / "r", "--samples", 0, "--json").document
    assert len(stored) == before["rows"] and all(str(pairs) in row.where for row in stored)
    assert any(fnmatch("held-out.safetensors", pattern) for pattern in KEPT_BACK)
