import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import VOCABULARY, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit import demo
from lorafit.config import settle
from lorafit.data import IGNORED, Example, Row, Tokens, collate, load, mask_tokens, prepare, read
from lorafit.errors import RequestError


def tokens(task="causal", length=64, **more) -> Tokens:
    found = tokenizer(task == "masked")
    prepare(found)
    return Tokens(found, task, length, VOCABULARY, **more)


def learned(row: Row, task="causal") -> str:
    return tokenizer(task == "masked").decode([label for label in row.labels if label != IGNORED])


def write(tmp_path: Path, *rows, name="data.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHAT = [
    {"role": "user", "content": "Where is Ada?"},
    {"role": "assistant", "content": "Ada is in the barn."},
    {"role": "user", "content": "Where is Ben?"},
    {"role": "assistant", "content": "Ben is at the market."},
]


def test_the_loss_covers_what_the_assistant_says_and_its_end():
    row = tokens().rows([Example("x", messages=tuple(CHAT))], "messages")[0]
    assert learned(row) == "Ada is in the barn.<|end|>Ben is at the market.<|end|>"
    whole = tokenizer().decode(row.ids)
    assert whole == tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert row.prompt == len(tokenizer()("<|begin|><|user|>Where is Ada?<|end|><|assistant|>")["input_ids"])


def test_a_line_break_behind_the_end_token_is_not_the_assistants(tmp_path):
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    row = Tokens(mine, "causal", 64, VOCABULARY).rows([Example("x", messages=tuple(CHAT[:2]))], "messages")[0]
    assert learned(row) == "Ada is in the barn.<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"
    )
    with pytest.raises(RequestError, match="rewrites earlier turns"):
        Tokens(mine, "causal", 64, VOCABULARY).rows([Example("x", messages=tuple(CHAT))], "messages")


def test_of_a_prompt_in_messages_nothing_is_learned(tmp_path):
    path = write(tmp_path, {"prompt": CHAT[:3], "completion": CHAT[3:]})
    row = tokens().rows(read(path, "auto")[0], "prompt-completion")[0]
    assert learned(row) == "Ben is at the market.<|end|>"


def test_a_default_template_for_a_tokenizer_without_one():
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = None
    maker = Tokens(mine, "causal", 64, VOCABULARY)
    row = maker.rows([Example("x", messages=tuple(CHAT[:2]))], "messages")[0]
    assert learned(row) == "Ada is in the barn.<|end|>" and any("no chat template" in n for n in maker.notes)


def test_a_line_separator_within_a_string_ends_no_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "four"}\n', encoding="utf-8")
    assert [e.where.rpartition(":")[2] for e in read(str(path), "auto")[0]] == ["1", "2"]


def test_prompt_and_completion():
    row = tokens().rows(
        [Example("x", prompt="Where is Ada?\n", completion="In the barn.")], "prompt-completion"
    )[0]
    assert learned(row) == "In the barn.<|end|>"
    assert tokenizer().decode(row.ids) == "Where is Ada?\nIn the barn.<|end|>"


def test_a_text_is_learned_whole():
    row = tokens().rows([Example("x", text="Ada went home.")], "text")[0]
    assert (
        row.labels[0] == IGNORED
        and row.supervised == len(row.ids) - 1
        and row.ids[-1] == tokenizer().eos_token_id
    )


def test_a_document_is_cut_into_windows_that_make_it_up():
    text = "Ada carried the lamp to the barn. " * 40
    rows = tokens(length=32).rows([Example("x", text=text)], "document")
    assert "".join(tokenizer().decode(r.ids) for r in rows) in text and all(
        len(r.ids) == 32 for r in rows[:-1]
    )


def test_a_masked_model_learns_the_completion_only():
    maker = tokens("masked")
    row = maker.rows([Example("x", prompt="Where is Ada? ", completion="In the barn.")], "prompt-completion")[
        0
    ]
    assert learned(row, "masked") == "In the barn." and row.ids[0] == 1 and row.ids[-1] == 2
    short = tokens("masked", length=10)
    row = short.rows(
        [Example("x", prompt="Where is Ada? " * 9, completion="In the barn.")], "prompt-completion"
    )[0]
    assert len(row.ids) == 10 and row.supervised and short.cut == 1


def test_sequence_to_sequence():
    row = tokens("seq2seq").rows([Example("x", prompt="Where?", completion="There.")], "prompt-completion")[0]
    assert tokenizer().decode(row.ids) == "Where?" and learned(row) == "There."
    with pytest.raises(RequestError, match="reads one text and writes another"):
        tokens("seq2seq").rows([Example("a.txt", text="plain")], "text")


def test_what_is_cut_and_dropped_is_counted():
    maker = tokens(length=8)
    rows = maker.rows(
        [Example("a", prompt="word " * 30, completion="x"), Example("b", prompt="a", completion="b " * 30)],
        "prompt-completion",
    )
    assert len(rows) == 1 and len(rows[0].ids) == 8 and (maker.cut, maker.dropped) == (2, 1)


def test_ids_beyond_the_embedding():
    maker = Tokens(tokenizer(), "causal", 64, 100)
    with pytest.raises(RequestError, match="beyond the model's 100 embeddings"):
        maker.rows([Example("x", text="Ada carried the basket.")], "text")


def test_formats_are_seen(tmp_path):
    rows = {
        "messages": {"messages": CHAT}, "prompt-completion": {"prompt": "a", "completion": "b"}, "text": {"text": "a"},
    }  # fmt: skip
    for name, row in rows.items():
        assert read(write(tmp_path, row, row), "auto")[1] == name
    split = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    assert read(write(tmp_path, split), "auto")[0][0].messages == tuple(CHAT[:2])
    (tmp_path / "list.json").write_text(json.dumps([rows["text"]]))
    assert read(str(tmp_path / "list.json"), "auto")[1] == "text"
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert read(str(tmp_path / "t.txt"), "auto")[1] == "document"
    assert [e.text for e in read(str(tmp_path / "t.txt"), "lines")[0]] == ["one", "two"]


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "is empty"), (b"  \n\n", "is empty"), (b'{"text": "a"}\n{"text": 3}\n', "data.jsonl:2`: `text` is no string but a number"),
        (b'{"text": null}\n', "no string but null"), (b'{"text": ""}', "is empty"), (b'{"text": "caf\xe9"}\n', "data.jsonl:1` is not UTF-8"),
        (b'{"text": "a"}\n{"text": \n', "data.jsonl:2` is no JSON"), (b"[1]\n", "no JSON object but a list"), (b'{"txt": "a"}', "no shape that is known"),
        (b'{"messages": []}', "no list of messages"), (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant speaks"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "no string"), (b'{"messages": ["a"]}', "has no `role`"),
        (b'{"prompt": "a", "completion": ""}', "nothing to learn"), (b'{"prompt": 1, "completion": "b"}', "`prompt` is no string"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "data.jsonl:2`: `text` is missing"),
        (b"\x00\x00\x00", "no JSON"), (b"[" * 100_000, "no JSON"), (b"NaN\n", "no JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path, content, word):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        read(str(path), "auto")
    assert word in error.value.message


def test_what_is_no_data(tmp_path):
    for spec in ("none.jsonl", str(tmp_path), "x"):
        with pytest.raises(RequestError):
            read(spec, "auto")
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write("x")
    with pytest.raises(RequestError, match="no kind of file"):
        read(str(tmp_path / "a.gz"), "auto")


def rows_of(flags: dict) -> object:
    config = replace(settle(flags)[0], max_length=128)
    return load(config, type(tokenizer()).from_pretrained(str(demo.MODEL)), "causal", VOCABULARY)


def test_the_demo_brings_its_own_held_out_rows():
    rows = rows_of({})
    assert (len(rows.train), len(rows.held_out)) == (900, 64) and rows.held_out_name == "held-out.jsonl"
    assert not {r.ids for r in rows.train} & {r.ids for r in rows.held_out}


def test_a_share_is_held_out_seeded(tmp_path):
    path = write(tmp_path, *({"text": f"Ada has {n} lamps."} for n in range(100)))
    one, two = rows_of({"data": (path,)}), rows_of({"data": (path,), "seed": 1})
    assert (len(one.train), len(one.held_out)) == (95, 5) and one.held_out_digest != two.held_out_digest
    assert one.held_out_digest == rows_of({"data": (path,)}).held_out_digest
    with pytest.raises(RequestError, match="one example"):
        rows_of({"data": (write(tmp_path, {"text": "a b c"}),)})


def test_a_documents_end_is_held_out(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"Ada has {n} lamps in the barn. " for n in range(900)))
    rows = rows_of({"data": (str(tmp_path / "t.txt"),)})
    assert (
        "899 lamps" in tokenizer().decode([i for r in rows.held_out for i in r.ids])
        and len(rows.held_out) >= 1
    )
    (tmp_path / "s.txt").write_text("Ada has lamps.")
    with pytest.raises(RequestError, match="is one window"):
        rows_of({"data": (str(tmp_path / "s.txt"),)})


def test_a_model_of_ones_own_needs_data():
    with pytest.raises(RequestError, match="needs data"):
        rows_of({"model": "other"})


def test_collate_pads_on_the_right():
    rows = [Row((5, 6, 7), (IGNORED, 6, 7), "a"), Row((8,), (8,), "b")]
    batch = collate(rows, pad=0, task="causal")
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]] and (
        batch.tokens,
        batch.supervised,
    ) == (4, 2)  # the first token of a row is predicted by none
    assert batch.places.tolist() == [0, 1] and batch.targets.tolist() == [6, 7] and batch.counts == (2, 0)


def test_masking_hides_a_share_and_at_least_one_a_row():
    rows = [
        Row(tuple(range(10, 410)), tuple(range(10, 410)), "a"),
        Row((5, 6, 7), (IGNORED, 6, IGNORED), "b"),
    ]
    batch = collate(rows, 0, "masked")
    masked = mask_tokens(batch, 9, 500, torch.Generator().manual_seed(0))
    hidden = masked.labels != IGNORED
    assert 30 < int(hidden[0].sum()) < 100 and hidden[1].nonzero().flatten().tolist() == [1]
    changed = masked.inputs["input_ids"] != batch.inputs["input_ids"]
    assert not (changed & ~hidden).any() and (masked.inputs["input_ids"] == 9).sum() > 0.6 * hidden.sum()


lines = st.lists(
    st.text(max_size=30)
    | st.dictionaries(
        st.sampled_from(["text", "prompt", "completion", "messages"]),
        st.text(max_size=5) | st.none() | st.lists(st.text(max_size=3), max_size=2),
        max_size=3,
    ).map(json.dumps),
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(lines)
def test_any_lines_are_examples_or_an_error(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("fuzz") / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        examples, _ = read(str(path), "auto")
        tokens().rows(examples, "auto")
    except RequestError as error:
        assert error.message
