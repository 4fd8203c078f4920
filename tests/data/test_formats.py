"""Whatever people have: containers, shapes, and what is wrong with them, by file and line."""

import csv
import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.data import formats
from lorafit.data.files import sources
from lorafit.data.formats import parse_map, read
from lorafit.errors import RequestError

ROWS = [{"prompt": f"What is {n}?", "completion": f"It is {n}, “zwölf”."} for n in range(5)]
SAID = [(row["prompt"], row["completion"]) for row in ROWS]


def found(spec, format="auto", columns=None):
    made = []
    for source in sources(str(spec)):
        made += read(source, format, columns)[1]
    return made


def write(folder, name):
    """The same five rows in a container of that name."""
    path = folder / name
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    table = pa.Table.from_pylist(ROWS)
    match name.partition(".")[2]:
        case "jsonl":
            path.write_text("\ufeff" + lines.replace("\n", "\r\n\n"), encoding="utf-8")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        case "json":
            path.write_text(json.dumps(ROWS))
        case "json.gz":
            path.write_bytes(gzip.compress(json.dumps({"version": 1, "data": ROWS}).encode()))
        case "csv" | "tsv":
            with path.open("w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(
                    file, ["prompt", "completion"], dialect="excel" if name.endswith("csv") else "excel-tab"
                )
                writer.writeheader()
                writer.writerows(ROWS)
        case "parquet":
            pq.write_table(table, path)
        case "arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        case "stream.arrow":
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
    return path


CONTAINERS = [
    "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.tsv", "a.parquet", "a.arrow", "a.stream.arrow",
]  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_hold_the_same_rows(tmp_path, name):
    if name == "a.stream.arrow":
        write(tmp_path, name).rename(tmp_path / "a.arrow")
        name = "a.arrow"
    else:
        write(tmp_path, name)
    made = found(tmp_path / name)
    assert [(e.prompt, e.completion) for e in made] == SAID
    assert all(e.where.startswith(str(tmp_path / name)) for e in made)


def test_a_folder_of_datasets_own_and_a_pattern(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [(e.prompt, e.completion) for e in found(tmp_path / "saved")] == SAID
    for name in ("b.jsonl", "a.csv", "README.md", ".hidden.jsonl"):
        write(tmp_path, name) if name[0] in "ab" else (tmp_path / name).write_text("not data")
    (tmp_path / "saved").rename(tmp_path.parent / f"{tmp_path.name}-saved")
    assert [(e.prompt, e.completion) for e in found(tmp_path)] == SAID * 2
    assert [(e.prompt, e.completion) for e in found(tmp_path / "*.csv")] == SAID
    write(tmp_path, "train-0.jsonl"), write(tmp_path, "test-0.jsonl")
    with pytest.raises(RequestError, match="several splits: test, train") as error:
        found(tmp_path)
    assert "*train*" in error.value.hint
    with pytest.raises(RequestError, match="no data file"):
        found(tmp_path / "*.parquet")


@pytest.mark.parametrize(
    "row, format, turns",
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages", ["user:a", "assistant:b"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "c"}], "name": None}, {"role": "assistant", "content": "b"}]}, "messages", ["user:ac", "assistant:b"]),
        ({"messages": json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), "system": "s"}, "messages", ["system:s", "user:a", "assistant:b"]),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "conversations", ["system:s", "user:a", "assistant:b"]),
        ({"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "system": ""}, "conversations", ["user:a", "assistant:b"]),
        ({"instruction": "i", "input": "x", "output": "o"}, "instruction", ["user:i\n\nx", "assistant:o"]),
        ({"instruction": "i", "input": "", "output": "o", "history": [["a", "b"]], "system": "s"}, "instruction", ["system:s", "user:a", "assistant:b", "user:i", "assistant:o"]),
    ],
)  # fmt: skip
def test_shapes_become_turns(tmp_path, row, format, turns):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (source,) = sources(str(path))
    seen, made = read(source)
    (example,) = made
    assert seen == format and [f"{t['role']}:{t['content']}" for t in example.messages] == turns
    assert all(set(turn) == {"role", "content"} for turn in example.messages)


def test_tools_pass_through(tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    row = {
        "conversations": [
            {"from": "human", "value": "1+1?"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "2"}, {"from": "gpt", "value": "2"},
        ],
        "tools": json.dumps([tool]),
    }  # fmt: skip
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (example,) = found(tmp_path / "a.jsonl")
    assert example.tools == (tool,) and [t["role"] for t in example.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert example.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "function": {"name": "f", "parameters": '{"type": "object"}'}},
        {"type": "function", "function": json.dumps({"name": "f", "parameters": {"type": "object"}})},
        json.dumps({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}),
    ],
    ids=["its parameters", "its function", "itself"],
)
def test_a_tool_that_is_written_as_json_text_is_the_object(tmp_path, tool):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "tools": [tool]}))
    (example,) = found(tmp_path / "a.jsonl")
    assert example.tools == (
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    )


def test_a_system_column_that_is_not_read_is_told(tmp_path):
    from lorafit.data.counts import Counts
    from lorafit.data.example import Reading

    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    for system, told in (("s", False), ("", False), ("t", True), (5, True)):
        (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns, "system": system}))
        (source,) = sources(str(tmp_path / "a.jsonl"))
        counts = Counts()
        (example,) = read(source, reading=Reading(counts=counts))[1]
        assert [t["content"] for t in example.messages] == ["s", "a", "b"]
        why = "the conversation has a system turn" if system == "t" else "it is a number"
        assert counts.notes == ([f"a `system` column is not used where {why}"] if told else [])


def test_an_instruction_without_an_output_is_mapped_whole(tmp_path):
    for row, hint in (
        ({"instruction": "i", "input": "x", "response": "r"}, "--map output=response"),
        ({"instruction": "i", "context": "x", "response": "r"}, "--map output=response,input=context"),
    ):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(RequestError) as error:
            found(tmp_path / "a.jsonl")
        assert error.value.hint == hint


def test_columns_under_other_names(tmp_path):
    (tmp_path / "a.csv").write_text("id,question,answer\n1,What?,That.\n")
    with pytest.raises(RequestError) as error:
        found(tmp_path / "a.csv")
    assert error.value.hint == "--map prompt=question,completion=answer"
    (example,) = found(tmp_path / "a.csv", columns=parse_map("prompt=question, completion = answer"))
    assert (example.prompt, example.completion, example.where) == ("What?", "That.", f"{tmp_path}/a.csv:2")
    with pytest.raises(RequestError, match="no column `q`, which --map names"):
        found(tmp_path / "a.csv", columns={"prompt": "q"})
    for text, words in (
        ("prompt", "NAME=COLUMN"),
        ("promt=a", "`promt`, which is not read"),
        ("=a", "which is not read"),
    ):
        with pytest.raises(RequestError, match=words):
            parse_map(text)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\x00"}\n', ":2` is not valid JSON: it holds NUL bytes"),
        ("a.jsonl", "{}".encode("utf-16"), "is UTF-16"),
        ("a.jsonl", b'{"text": "caf\xe9"}', ":1` is not UTF-8 (byte 0xe9)"),
        ("a.jsonl", b"[\n{}\n]\n", "is not valid JSON"),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b"}', "holds preferences"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "`image`: only text is learned here"),
        ("a.jsonl", b'{"conversations": [{"from": "narrator", "value": "a"}]}', "unknown speaker `narrator`"),
        ("a.jsonl", b'{"instruction": "a", "output": ""}', ":1`: the answer is empty"),
        ("a.jsonl", b'{"instruction": "a", "output": "b", "history": "a"}', "`history` is not valid JSON"),
        ("a.jsonl", b'{"messages": "not json"}', "`messages` is not valid JSON"),
        ("a.json", b'{"a": 1}', "not a list of examples"), ("a.json", b"[1, 2]", "not a JSON object but a number"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', "a.json:2` is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-9], "is damaged"), ("a.jsonl.gz", b"no gzip", "is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 99, mtime=0)[:40] + b"\0" * 40, "is damaged"),
        ("a.csv", b"What?,That.\nWho?,He.\n", "not a known data format"), ("a.csv", b"text,text\na,b\n", "`text` twice"),
        ("a.csv", b"text,\na,b\n", "has 2 fields, and the first line names 1"), ("a.csv", b"prompt,completion\na,b,c\n", ":2` has 3 fields, and the first line names 2"),
        ("a.csv", b'prompt,completion\n"a\nb\nc,d\n', "is not valid CSV"), ("a.csv", b"\n\n", "is empty"), ("a.csv", b"text\n", "is empty"),
        ("a.tsv", b"prompt\tcompletion\na\n", "has 1 fields"), ("a.parquet", b"PAR1 no", "is damaged"), ("a.arrow", b"ARROW1 no", "is damaged"),
        ("a.parquet", b"", "is damaged"), ("a.txt", b" \n\n", "is empty"), ("a.txt", b"caf\xe9", ":1` is not UTF-8"), ("a.xlsx", b"", "not a data file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        found(path)
    assert words in error.value.message, error.value.message


def test_a_line_of_a_hundred_megabytes(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n')
    tracemalloc.start()
    with pytest.raises(RequestError, match=r":2` is a line of more than 32 MB"):
        found(path)
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


def test_a_document_is_read_in_blocks_that_make_it_up(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 1000)
    text = "".join(f"Line {n}.\n" + "\n  indented\n" * (n % 3 == 0) for n in range(400))
    (tmp_path / "a.txt").write_text(text)
    blocks = found(tmp_path / "a.txt")
    assert len(blocks) > 4 and "".join(b.text for b in blocks) == text
    assert all(b.text[:1].strip() for b in blocks)
    assert blocks[1].number == blocks[0].text.count("\n") + 1


def test_a_big_file_is_read_bit_by_bit(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "word " * 2000}) + "\n"
    with path.open("w") as file:
        for _ in range(3000):
            file.write(line)
    (source,) = sources(str(path))
    heard = []
    tracemalloc.start()
    assert sum(1 for _ in read(source, tick=heard.append)[1]) == 3000
    assert tracemalloc.get_traced_memory()[1] < 2_000_000 < path.stat().st_size
    tracemalloc.stop()
    assert heard == sorted(heard) and heard[-1] > 0.8 * path.stat().st_size


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "text", "tool_calls"]), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
KEYS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "system",
     "tools", "history", "chosen", "x"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(KEYS, values, max_size=4), max_size=3), st.sampled_from(["a.jsonl", "a.json"])
)
def test_any_rows_are_examples_or_a_request_error(tmp_path_factory, rows, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_text("\n".join(map(json.dumps, rows)) if name == "a.jsonl" else json.dumps(rows))
    try:
        for example in found(path):
            assert example.where and example.kind in ("messages", "prompt-completion", "text")
    except RequestError as error:
        assert error.message


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.jsonl.gz", "a.parquet", "a.arrow"]),
)
def test_any_bytes_are_examples_or_a_request_error(tmp_path_factory, raw, name):
    path = tmp_path_factory.mktemp("fuzz") / name
    path.write_bytes(raw)
    try:
        assert found(path)
    except RequestError as error:
        assert error.message


def test_what_datasets_keeps_beside_its_data_is_no_data(tmp_path):
    """`map` and `filter` leave `cache-….arrow` in a folder that `save_to_disk` has made."""
    from datasets import Dataset, load_from_disk

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "d")
    load_from_disk(str(tmp_path / "d")).map(lambda row: {"completion": row["completion"] + "!"})
    assert list((tmp_path / "d").glob("cache-*.arrow"))
    assert [(e.prompt, e.completion) for e in found(tmp_path / "d")] == SAID
    write(tmp_path, "cache-mine.arrow")  # a file of one's own
    assert len(found(tmp_path / "cache-mine.arrow")) == len(found(tmp_path / "cache-*.arrow")) == 5


@pytest.mark.parametrize(
    "files, named",
    [
        (("train.jsonl", "validation.jsonl"), "*train*"),
        (("Train-0.jsonl", "Train-1.jsonl", "test.jsonl"), "*Train*"),
        (("data/train-00000.jsonl", "data/test-00000.jsonl"), "data/*train*"),
        (("train/a.jsonl", "test/a.jsonl"), "train"),
        (("en/train/a.jsonl", "en/train/b.jsonl", "en/valid/a.jsonl"), "en/train"),
        (("test.jsonl", "validation.jsonl"), "*validation*"),
    ],
)
def test_of_several_splits_one_that_is_there_is_named(tmp_path, files, named):
    """Followed, the hint reads that split and nothing else; where there is one, that of training."""
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    with pytest.raises(RequestError, match="holds several splits") as refused:
        found(tmp_path)
    place = refused.value.hint.partition("--data '")[2].rstrip("'")
    assert place == str(tmp_path / named)
    split = "train" if any("train" in name.lower() for name in files) else "validation"
    assert sorted(e.prompt for e in found(place)) == sorted(n for n in files if split in n.lower())
