"""Rows as people's files hold them: read, or named with file and line; nothing is left aside unsaid."""

from __future__ import annotations

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from templates import CHATS, shaped, spans, turn

from lorafit import demo
from lorafit.data import load
from lorafit.data.files import sources
from lorafit.data.formats import read
from lorafit.data.rows import IGNORED, read_rows, save_rows
from lorafit.data.tokens_shown import write_rows
from lorafit.errors import RequestError
from lorafit.settings import settle

PAIR = [{"prompt": f"{n}+1=", "completion": f" {n + 1}"} for n in range(6)]


def write(folder, name, *rows):
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def rows_of(path, tokenizer=None, **flags):
    from families import VOCABULARY
    from transformers import AutoTokenizer

    config = settle({"data": (str(path),), "max_length": 256, **flags})[0]
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(str(demo.MODEL))
    return load(config, tokenizer, "causal", max(VOCABULARY, len(tokenizer)))


def found(path, **more):
    return [e for source in sources(str(path)) for e in read(source, **more)[1]]


# -- one text, one encoding


def test_prompt_and_completion_are_one_encoding_on_a_tokenizer_with_word_marks(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    alphabet = sorted({*"abcdefghijklmnopqrstuvwxyz0123456789+=?. \n▁"})
    inner.train_from_iterator(
        ["two and two is four lima"] * 3,
        trainers.BpeTrainer(
            vocab_size=90,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    rows = [
        {"prompt": "2+2=", "completion": "4"},
        {"prompt": "the city is li", "completion": "ma"},
        {"prompt": "two ", "completion": "four"},
    ]
    made = rows_of(write(tmp_path, "d.jsonl", *rows), tok)
    by_line = {row.number: row for row in (*made.train, *made.held_out)}
    for number, given in enumerate(rows, 1):
        ids = list(by_line[number].ids)
        assert ids == [*tok(given["prompt"] + given["completion"])["input_ids"], 2]
        assert ids.count(1) == 1


def test_a_begin_token_in_the_text_is_not_doubled_and_no_token_of_a_text_is_deleted(tmp_path):
    tokenizer, _ = shaped("llama3")
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    rows = [
        {"prompt": "a<|eos|>", "completion": "b"},
        {"prompt": "<|begin|>a", "completion": "b"},
        {"prompt": "a", "completion": "b<|eos|>"},
    ]
    made = rows_of(write(tmp_path, "d.jsonl", *rows), tokenizer)
    texts = {r.number: tokenizer.decode(r.ids) for r in (*made.train, *made.held_out)}
    assert texts == {1: "<|begin|>a<|eos|>b<|eos|>", 2: "<|begin|>ab<|eos|>", 3: "<|begin|>ab<|eos|>"}
    (tmp_path / "t.txt").write_text("Where is Ada? " * 200)
    windows = rows_of(tmp_path / "t.txt", tokenizer)
    assert all(
        row.ids[0] == begin and row.labels[0] == IGNORED and len(row.ids) <= 256 for row in windows.train
    )


def test_a_slow_tokenizer_marks_by_prefixes():
    from lorafit.data.encode import Encoder, Text

    class Slow:
        """A tokenizer of words and marks, without offsets."""

        is_fast, all_special_ids, chat_template, eos_token_id, bos_token_id = False, [], None, None, None

        def __call__(self, text, add_special_tokens=True, verbose=True):
            import re

            self.words = getattr(self, "words", [])
            ids = []
            for word in re.findall(r"\w+|\W", text):
                if word not in self.words:
                    self.words.append(word)
                ids.append(self.words.index(word))
            return {"input_ids": ids}

        def decode(self, ids, **more):
            return "".join(self.words[i] for i in ids)

    encoder = Encoder.of(Slow())
    (clean,) = encoder.encode([Text("one two three", ((8, 13),))])
    assert (
        encoder.tokenizer.decode([x for x in clean.labels if x != IGNORED]) == "three" and clean.seam is None
    )
    (crossing,) = encoder.encode([Text("one twothree", ((7, 12),))])
    assert encoder.tokenizer.decode([x for x in crossing.labels if x != IGNORED]) == "twothree"
    assert crossing.seam == 2


# -- bad and blank rows


def test_all_bad_rows_are_found_in_one_run(tmp_path):
    rows = [
        *PAIR[:2],
        "{broken",
        {"prompt": "a", "completion": 3},
        *PAIR[2:],
        '{"prompt": "\\ud83d", "completion": "b"}',
    ]
    path = write(tmp_path, "d.jsonl", *rows, *["[]"] * 7)
    with pytest.raises(RequestError) as error:
        rows_of(path)
    said = error.value.message
    assert said.startswith("10 rows cannot be used") and said.endswith("and 5 more")
    for line in (3, 4, 9, 10, 11):
        assert f"d.jsonl:{line}`" in said
    assert "--on-bad-row skip" in error.value.hint
    made = rows_of(path, on_bad_row="skip")
    assert made.look.rows + made.look.held_out_rows == 6 and made.look.bad == 10
    assert any("skipped 10 bad rows" in note for note in made.look.notes)


def test_a_file_of_another_kind_is_refused_soon(tmp_path):
    path = write(tmp_path, "d.jsonl", *["not json"] * 5000)
    with pytest.raises(RequestError, match="1,000 rows cannot be used"):
        rows_of(path)


def test_blank_rows_are_skipped_and_counted(tmp_path):
    blank = [{"text": ""}, {"text": "  \n"}, {"text": None}]
    made = rows_of(
        write(tmp_path, "d.jsonl", *blank, *({"text": f"Ada has {n} lamps."} for n in range(4)), *blank)
    )
    assert (made.look.blank, made.look.rows + made.look.held_out_rows) == (6, 4)
    wide = [{"text": "", "id": 1}, *({"text": f"Ada has {n} lamps.", "id": n} for n in range(4))]
    assert rows_of(write(tmp_path, "w.jsonl", *wide)).look.blank == 1


NO_ANSWER = {
    "completion": {"prompt": "a", "completion": ""},
    "output": {"instruction": "a", "output": " "},
    "messages": {"messages": []},
    "text": {"messages": [turn("user", "a"), turn("assistant", "")]},
    "null": {"messages": [turn("user", "a"), turn("assistant", None)]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]},
    "turns": {"prompt": [turn("user", "a")], "completion": [turn("assistant", "")]},
}


@pytest.mark.parametrize("shape", NO_ANSWER.values(), ids=NO_ANSWER)
def test_a_row_with_an_empty_answer_is_left_out_and_counted(tmp_path, shape):
    """As public data sets have some; where no other row is left, that is the error."""
    good = {k: ("b" if isinstance(v, str) else CHATS["one"]) for k, v in shape.items()}
    if "conversations" in shape:
        good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    empty_cells = dict.fromkeys(shape)
    look = rows_of(write(tmp_path, "s.jsonl", good, shape, good, shape, good, empty_cells)).look
    assert (look.bad, look.blank, look.rows + look.held_out_rows) == (0, 1, 3)
    (said,) = (note for note in look.notes if "without an answer" in note)
    assert (
        said.startswith("left out 2 rows without an answer, e.g. `")
        and "s.jsonl:2`: the answer is empty" in said
    )
    with pytest.raises(RequestError, match=r"t\.jsonl:1`: the answer is empty.*, as in all 2 rows"):
        rows_of(write(tmp_path, "t.jsonl", shape, shape))


def test_skipped_rows_are_named_once_for_each_reason(tmp_path):
    odd, wrong = {"prompt": "a", "completion": 4}, {"prompt": 3, "completion": "b"}
    look = rows_of(write(tmp_path, "d.jsonl", PAIR[0], odd, odd, wrong, *PAIR), on_bad_row="skip").look
    (said,) = (note for note in look.notes if "bad rows" in note)
    first = "d.jsonl:2`: `completion` is a number, not a string; `"
    assert said.startswith("skipped 3 bad rows, e.g. `") and said.endswith(
        "d.jsonl:4`: `prompt` is a number, not a string"
    )
    assert said.count("`completion` is") == 1 and first in said


def test_a_role_that_nobody_knows_is_a_bad_row(tmp_path):
    """Misspelt in a question or an answer; a role is known by its usual names, or by the chat template's."""
    chatml, _ = shaped("chatml")
    good = {"messages": CHATS["one"]}
    spelt = {"messages": [turn("System", "Be kind."), turn(" user ", "a"), turn("Assistant ", "b"), turn("developer", "c"),
                          turn("ipython", "2"), turn("model", "d")]}  # fmt: skip
    wrong = {"messages": [turn("usr", "a"), turn("assistant", "b")]}
    path = write(tmp_path, "d.jsonl", good, spelt, wrong, good, good)
    with pytest.raises(RequestError, match=r"d\.jsonl:3`: role `usr` is not known") as error:
        rows_of(path, chatml)
    assert error.value.hint == "did you mean `user`?"
    look = rows_of(path, chatml, on_bad_row="skip").look
    assert (look.bad, look.rows + look.held_out_rows) == (1, 4)

    with pytest.raises(RequestError, match="no assistant message") as error:
        rows_of(write(tmp_path, "e.jsonl", {"messages": [turn("user", "a"), turn("asistant", "b")]}), chatml)
    assert error.value.hint == "role `asistant`: did you mean `assistant`?"

    path = write(tmp_path, "c.jsonl", *[{"messages": [turn("critic", "Be brief."), *CHATS["one"]]}] * 3)
    with pytest.raises(RequestError, match=r"3 rows cannot be used.*role `critic` is not known") as error:
        rows_of(path, chatml)
    assert "the chat template names" in error.value.hint
    head = "{% for m in messages %}{% if m.role == 'critic' %}{{ m.content }}{% endif %}{% endfor %}"
    named, _ = shaped("chatml")
    named.chat_template = head + named.chat_template
    assert rows_of(path, named).look.bad == 0
    named.chat_template = {"default": named.chat_template + '{{ "" }}'}  # as a tokenizer with several has it
    assert rows_of(path, named).look.bad == 0


def test_rows_are_held_out_among_those_that_survive(tmp_path):
    long = {"prompt": "word " * 400, "completion": "x"}
    made = rows_of(write(tmp_path, "d.jsonl", *[long] * 30, *PAIR[:2]))
    assert (made.look.rows, made.look.held_out_rows) == (1, 1)


def test_a_group_stays_on_one_side(tmp_path):
    rows = [{"text": f"Ada has {n} lamps.", "who": f"w{n % 7}"} for n in range(70)]
    made = rows_of(write(tmp_path, "d.jsonl", *rows), group_by="who", holdout=0.3)
    sides = [{(row.number - 1) % 7 for row in part} for part in (made.train, made.held_out)]
    assert sides[0] | sides[1] == set(range(7)) and not sides[0] & sides[1]
    assert made.look.held_out_rows >= 20 and not any("who" in note for note in made.look.notes)
    with pytest.raises(RequestError, match="no column `whom`"):
        rows_of(tmp_path / "d.jsonl", group_by="whom")


# -- what is not read


def test_columns_and_keys_that_are_not_read_are_listed(tmp_path):
    made = rows_of(
        write(tmp_path, "d.jsonl", *({"text": f"good {n}", "label": n, "id": "x"} for n in range(4)))
    )
    assert "columns not used: `label`, `id`" in made.look.notes
    chat = [turn("user", "a", mood="glad"), turn("assistant", "b")]
    made = rows_of(write(tmp_path, "c.jsonl", *[{"messages": chat}] * 3))
    assert "keys of messages not used: `mood`" in made.look.notes


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"train": False},
        {"loss": False},
        {"trainable": False},
        {"loss_weight": 0.0},
        {"weight": "0"},
    ],
)
def test_turns_without_weight_are_not_learned(tmp_path, mark):
    chat = [*CHATS["two"]]
    chat[1] = {**chat[1], **mark}
    path = write(tmp_path, "d.jsonl", *[{"messages": chat}] * 3)
    tokenizer, _ = shaped("chatml")
    made = rows_of(path, tokenizer)
    assert spans(tokenizer, made.train[0]) == ["At the market.<|im_end|>"]
    assert any("3 rows or answers have weight 0" in note for note in made.look.notes)


def test_rows_without_weight_are_left_out_and_a_column_of_other_numbers_is_no_weight(tmp_path):
    rows = [{**PAIR[0], "weight": 0}, {**PAIR[1], "weight": 1}, {**PAIR[2], "weight": 1}]
    made = rows_of(write(tmp_path, "d.jsonl", *rows))
    assert made.look.rows + made.look.held_out_rows == 2
    made = rows_of(write(tmp_path, "f.jsonl", *({**pair, "weight": 72.5} for pair in PAIR)))
    assert "columns not used: `weight`" in made.look.notes and made.look.weight == made.look.supervised_tokens


def by_number(made):
    return {row.number: row for row in (*made.train, *made.held_out)}


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_weights_of_rows_and_turns_are_those_of_their_tokens(tmp_path, overflow):
    """A turn's weight is that of its tokens alone, times the row's; through the rows' file and back."""
    chat = [*CHATS["two"], turn("user", "And then?"), turn("assistant", "Home.")]
    first, second, third = (n for n, said in enumerate(chat) if said["role"] == "assistant")
    chat[first] = {**chat[first], "weight": 0.25}
    chat[third] = {**chat[third], "train": False}
    plain = [{k: v for k, v in said.items() if k not in ("weight", "train")} for said in chat]
    tokenizer, _ = shaped("chatml")
    path = write(tmp_path, "d.jsonl", {"messages": chat, "loss_weight": 3}, *[{"messages": plain}] * 2)
    made = rows_of(path, tokenizer)
    row = by_number(made)[1]
    spoken = {0.75: plain[first]["content"], 3.0: plain[second]["content"]}
    for weight, text in spoken.items():
        ids = [
            label
            for label, w in zip(row.labels, row.weights, strict=True)
            if w == weight and label != IGNORED
        ]
        assert tokenizer.decode(ids) == f"{text}<|im_end|>"
    assert {w for w, label in zip(row.weights, row.labels, strict=True) if label != IGNORED} == {*spoken}
    assert not by_number(made)[2].weights
    assert "2 rows or answers have a weight of their own in the loss: 0.25 to 3" in made.look.notes
    whole = sum(r.weight for r in made.train)
    assert made.look.weight == pytest.approx(whole)

    stored = tmp_path / "rows.safetensors"
    save_rows(made.train, stored)
    assert [r.weights for r in read_rows(stored)] == [r.weights for r in made.train]
    out = tmp_path / "out.jsonl"
    write_rows(out, (made.train, made.held_out))
    again = rows_of(out, tokenizer, format="tokens")
    assert sorted(r.weights for r in (*again.train, *again.held_out)) == sorted(
        r.weights for r in (*made.train, *made.held_out)
    )
    short = rows_of(path, tokenizer, overflow=overflow, max_length=24)
    pieces = [r for r in (*short.train, *short.held_out) if r.number == 1]
    assert len(pieces) > 1 or overflow == "truncate"
    at = 0
    for piece in pieces:  # each label keeps its weight
        start = next(n for n in range(at, len(row.ids)) if row.ids[n : n + len(piece.ids)] == piece.ids)
        assert piece.weights == row.weights[start : start + len(piece.ids)]
        at = start + 1


def test_a_rows_weight_is_that_of_all_its_labels_and_changes_what_the_row_is(tmp_path):
    path = write(tmp_path, "d.jsonl", {**PAIR[0], "weight": 0.5}, {**PAIR[0], "weight": "0.5"}, *PAIR)
    made = rows_of(path)
    rows = by_number(made)
    assert set(rows[1].weights) == {0.5} and rows[1].weight == 0.5 * rows[1].supervised
    assert rows[1].weights == rows[2].weights and not rows[3].weights
    assert rows[1].ids == rows[3].ids
    contents = dict(zip([r.number for r in made.train], made.train.contents.tolist(), strict=True))
    same = [contents[n] for n in (1, 2, 3) if n in contents]
    assert len(set(same)) == len({n == 3 for n in (1, 2, 3) if n in contents})


@pytest.mark.parametrize(
    "mark", [{"weight": -1}, {"weight": "much"}, {"loss_weight": "nan"}, {"train": "maybe"}]
)
def test_what_is_not_a_weight_of_a_turn_is_a_bad_row(tmp_path, mark):
    chat = [turn("user", "a"), {**turn("assistant", "b"), **mark}]
    with pytest.raises(RequestError, match=r"d.jsonl:1`.*a weight is true, false, or a number from 0 on"):
        rows_of(write(tmp_path, "d.jsonl", {"messages": chat}))
    with pytest.raises(RequestError, match="`loss_weight` is -1"):
        rows_of(write(tmp_path, "e.jsonl", {**PAIR[0], "loss_weight": -1}))


def test_weights_of_turns_reach_a_model_that_reads_one_text_and_writes_another(tmp_path):
    from families import VOCABULARY
    from transformers import AutoTokenizer

    def chat(**mark):
        return {"messages": [turn("user", "a lamp"), {**turn("assistant", "is light"), **mark}]}

    config = settle(
        {"data": (str(write(tmp_path, "d.jsonl", chat(weight=0), chat(weight=0.5), chat(), chat())),)}
    )[0]
    tokenizer = AutoTokenizer.from_pretrained(str(demo.MODEL))
    rows = by_number(
        load(replace(config, max_length=64), tokenizer, "seq2seq", max(VOCABULARY, len(tokenizer)))
    )
    assert 1 not in rows and set(rows[2].weights) == {0.5} and not rows[3].weights
    assert len(rows[2].weights) == len(rows[2].labels)


def test_nulls_that_a_table_filled_in_are_removed_all_the_way_down(tmp_path):
    calls = [
        {"function": {"name": "find", "arguments": {"who": "Ada"}}},
        {"function": {"name": "go", "arguments": {"to": "barn"}}},
    ]
    chats = [[turn("user", "a"), turn("assistant", "", tool_calls=[call])] for call in calls]
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in chats]), tmp_path / "d.parquet")
    got = [example.messages[1]["tool_calls"][0] for example in found(tmp_path / "d.parquet")]
    assert got == calls


# -- shapes and containers


@pytest.mark.parametrize(
    "row",
    [
        {"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}},
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"messages": [turn("User", "a"), turn("Assistant", "b")]},
        {"messages": [turn("human", "a"), turn("model", "b")]},
        {"conversations": [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]},
        {"prompt": [turn("user", "a")], "completion": "b"},
    ],
)
def test_turns_as_people_write_them(tmp_path, row):
    (example,) = found(write(tmp_path, "d.jsonl", row))
    assert [(t["role"], t["content"]) for t in example.messages] == [("user", "a"), ("assistant", "b")]


def test_calls_as_people_write_them(tmp_path):
    wanted = {"name": "find", "arguments": {"who": "Ada"}}
    for said in (
        turn("function_call", json.dumps(wanted)),
        turn("assistant", None, function_call=wanted),
        turn("assistant", "", tool_calls=json.dumps([{"function": wanted}])),
    ):
        row = {
            "messages": [turn("user", "a"), said, turn("observation", "barn"), turn("assistant", "b")],
            "functions": [{"name": "find"}],
        }
        (example,) = found(write(tmp_path, "d.jsonl", row))
        assert example.messages[1]["tool_calls"][0]["function"] == wanted
        assert [t["role"] for t in example.messages] == ["user", "assistant", "tool", "assistant"]
        assert example.tools[0]["function"] == {"name": "find"}


@pytest.mark.parametrize("name", ["d.json", "d.data", "d", "d.jl", "d.txt", "d.jsonl.zst", "d.jsonl.gz"])
def test_json_lines_under_any_name(tmp_path, name):
    raw = "".join(json.dumps(row) + "\n" for row in PAIR).encode()
    if name.endswith(".zst"):
        raw = pa.compress(raw, codec="zstd", asbytes=True)
    if name.endswith(".gz"):
        import gzip

        raw = gzip.compress(raw)
    (tmp_path / name).write_bytes(raw)
    assert [(e.prompt, e.completion) for e in found(tmp_path / name)] == [
        (r["prompt"], r["completion"]) for r in PAIR
    ]


@pytest.mark.parametrize("name", ["d.json", "d.txt", "d"])
@pytest.mark.parametrize("odd", ["\u2028", "\u0085", "x" * (1 << 20)], ids=["LS", "NEL", "a long line"])
def test_json_lines_are_known_whatever_their_texts_hold(tmp_path, name, odd):
    rows = [{"prompt": f"a{odd}", "completion": "b"}, *PAIR]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert [example.prompt for example in found(tmp_path / name)] == [row["prompt"] for row in rows]


def test_text_that_is_wanted_as_text_stays_text(tmp_path):
    path = write(tmp_path, "d.txt", *PAIR)
    assert "completion" in found(path, format="document")[0].text


def test_sub_folders_are_read_and_splits_told_apart(tmp_path):
    write(tmp_path / "d", "a/one.jsonl", *PAIR[:2]), write(tmp_path / "d", "b/c/two.jsonl", *PAIR[2:])
    write(tmp_path / "d", ".git/three.jsonl", *PAIR)
    assert len(found(tmp_path / "d")) == 6
    write(tmp_path / "e", "train/one.jsonl", *PAIR), write(tmp_path / "e", "test/one.jsonl", *PAIR)
    with pytest.raises(RequestError, match="several splits: test, train") as error:
        found(tmp_path / "e")
    assert error.value.hint.endswith("/train'")


@pytest.mark.parametrize(
    "name, text, flags",
    [
        ("d.csv", "\ufeffprompt;completion\r\na, b;c\r\n", {}),
        ("d.csv", "\ufeffsep=;\r\nprompt;completion\r\na, b;c\r\n;\r\n;\r\n", {}),
        ("d.csv", 'prompt,completion,\r\n"a, b",c,\r\n,,\r\n', {}),
        ("d.csv", "prompt\tcompletion\na, b\tc\n", {}),
        ("d.csv", ',prompt,completion\n0,"a, b",c\n', {}),  # pandas' index
        ("d.csv", "prompt~completion\na, b~c\n", {"csv_delimiter": "~"}),
        ("d.tsv", 'prompt\tcompletion\na, b\t"c\n', {"csv_quote": "none"}),
    ],
)
def test_tables_as_spreadsheets_save_them(tmp_path, name, text, flags):
    path = tmp_path / name
    path.write_text(
        text + text.splitlines()[2 if "sep=" in text else 1].replace("a, b", "a, b") + "\n",
        encoding="utf-8",
        newline="",
    )
    made = rows_of(path, **flags)
    assert made.look.rows + made.look.held_out_rows == 2
    texts = {row.number: row for row in (*made.train, *made.held_out)}
    assert len(texts) == 2 and min(texts) == (3 if "sep=" in text else 2)


def test_a_table_with_a_wrong_separator_names_it(tmp_path):
    path = tmp_path / "d.tsv"
    path.write_text('prompt\tcompletion\na\t"b" c\nd\te\n')
    with pytest.raises(RequestError, match="not valid TSV") as error:
        rows_of(path)
    assert "`\\t`" in error.value.message and "--csv-quote none" in error.value.hint


def test_ids_and_labels_are_taken_as_they_are(tmp_path):
    rows = [{"input_ids": [5, 6, 7, n], "labels": [-100, -100, 7, n]} for n in range(8, 12)]
    made = rows_of(write(tmp_path, "d.jsonl", *rows))
    got = {row.number: row for row in (*made.train, *made.held_out)}
    for number, given in enumerate(rows, 1):
        assert (list(got[number].ids), list(got[number].labels)) == (given["input_ids"], given["labels"])
    with pytest.raises(RequestError, match="3 input_ids and 2 labels"):
        rows_of(write(tmp_path, "e.jsonl", {"input_ids": [1, 2, 3], "labels": [1, 2]}, *rows))
    with pytest.raises(RequestError, match="not a list of token ids"):
        rows_of(write(tmp_path, "f.jsonl", {"input_ids": [1, "a"]}, *rows))


@pytest.mark.parametrize("padded", ["behind", "before"])
def test_what_an_attention_mask_leaves_out_is_not_learned(tmp_path, padded):
    def row(n, **more):
        ids, mask = [5, 6, n, 0, 0], [1, 1, 1, 0, 0]
        turned = slice(None, None, -1) if padded == "before" else slice(None)
        return {"input_ids": ids[turned], "attention_mask": mask[turned], **more}

    wanted = {n: [n, 6, 5] if padded == "before" else [5, 6, n] for n in range(8, 12)}
    made = rows_of(write(tmp_path, "d.jsonl", *(row(n) for n in wanted)))
    for got in (*made.train, *made.held_out):
        assert list(got.ids) == wanted[got.number + 7] and list(got.labels)[1:] == list(got.ids)[1:]
    made = rows_of(
        write(
            tmp_path,
            "w.jsonl",
            *(row(n, labels=row(n)["input_ids"], weights=[1, 1, 1, 2, 2]) for n in wanted),
        )
    )
    assert all(len(got.ids) == len(got.labels) == 3 for got in made.train)
    for mask in ([1, 1], "x", [1, 1, 1, None, 0]):
        with pytest.raises(RequestError, match="`attention_mask` is not"):
            rows_of(write(tmp_path, "e.jsonl", row(8, attention_mask=mask)))


def test_a_decoders_labels_have_nothing_to_do_with_the_mask(tmp_path):
    from lorafit.data.token_rows import tokens_of

    row = {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0], "labels": [7, 8, 9, 2]}
    assert tokens_of(row, "here") == ((5, 6), (7, 8, 9, 2), ())


# -- templates and options


def test_plain_rows_beside_a_chat_template_are_named_with_both_renderings(tmp_path):
    path = write(tmp_path, "d.jsonl", *({"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(4)))
    tokenizer, _ = shaped("chatml")
    made = rows_of(path, tokenizer)
    (note,) = [n for n in made.look.notes if "--as-chat" in n]
    assert "`0+1=1`" in note and "<|im_start|>user⏎0+1=<|im_end|>" in note
    assert any("nothing stands between prompt and completion" in n for n in made.look.notes)
    made = rows_of(path, tokenizer, as_chat=True)
    assert tokenizer.decode(made.train[0].ids).startswith("<|im_start|>user\n")
    assert not any("--as-chat" in n for n in made.look.notes)


def test_a_named_end_token(tmp_path):
    tokenizer, _ = shaped("chatml")
    made = rows_of(write(tmp_path, "d.jsonl", *PAIR), tokenizer, end_token="<|im_end|>")
    assert tokenizer.eos_token == "<|im_end|>" and made.train[0].ids[-1] == tokenizer.eos_token_id
    with pytest.raises(RequestError, match="is not a token of this tokenizer") as error:
        rows_of(tmp_path / "d.jsonl", tokenizer, end_token="<|im_ent|>")
    assert "<|im_end|>" in error.value.hint


def test_a_stored_date_is_used_again(tmp_path):
    path = write(tmp_path, "d.jsonl", *[{"messages": CHATS["one"]}, {"messages": CHATS["two"]}] * 2)
    one, two = (rows_of(path, shaped("llama3")[0], template_date="2026-01-31T10:00") for _ in range(2))
    other = rows_of(path, shaped("llama3")[0], template_date="2026-02-01")
    assert one.train.digest == two.train.digest != other.train.digest


def test_stored_rows_know_what_they_were_made_with(tmp_path, monkeypatch):
    from lorafit.data import dataset

    monkeypatch.setattr(dataset, "STORED_FROM", 1)
    path = write(tmp_path, "d.jsonl", *[{"messages": CHATS["one"]}, {"messages": CHATS["two"]}] * 3)
    keys = []
    kept = dataset._key
    monkeypatch.setattr(dataset, "_key", lambda *a: keys.append(kept(*a)) or keys[-1])
    jinja = tmp_path / "t.jinja"
    jinja.write_text(shaped("gpt-oss")[0].chat_template)
    variants = [
        {},
        {"template_args": "a=1"},
        {"end_token": "<|im_end|>"},
        {"chat_template": str(jinja)},
        {"as_chat": True},
        {"loss_on": "last"},
        {"template_date": "2026-01-31"},
    ]
    for flags in variants:
        rows_of(path, shaped("chatml")[0], **flags)
    assert len(set(keys)) == len(variants) - 1  # a template without a date does not depend on it
    keys.clear()
    for day in ("2026-01-31", "2026-02-01"):
        rows_of(path, shaped("llama3")[0], template_date=day)
    assert len(set(keys)) == 2


def test_an_answer_is_learned_where_it_is_one_token_with_the_whole_prompt(tmp_path):
    tokenizer, _ = shaped("chatml")
    merged = next(t for t in ("In", "th", "re", "er", "is", "ar") if len(tokenizer(t)["input_ids"]) == 1)
    rows = [{"prompt": merged[0], "completion": merged[1]}] * 3
    made = rows_of(write(tmp_path, "d.jsonl", *rows), tokenizer)
    assert spans(tokenizer, made.train[0]) == [merged[1] + "<|endoftext|>"]


def test_keys_that_the_template_reads_are_not_listed(tmp_path):
    chat = [
        turn("user", "a"),
        turn("assistant", "b", thinking="Of b."),
        turn("user", "c", name="Ada"),
        turn("assistant", "d"),
    ]
    made = rows_of(write(tmp_path, "d.jsonl", *[{"messages": chat, "tools": []}] * 3), shaped("gpt-oss")[0])
    assert "keys of messages not used: `name`" in made.look.notes
    assert not any("columns" in note for note in made.look.notes)


def test_a_text_of_other_objects_is_a_document(tmp_path):
    path = write(tmp_path, "log.txt", *({"time": n, "event": "Ada went home."} for n in range(90)))
    assert rows_of(path).look.sources[0].format == "document"


def test_a_bad_row_near_the_head_of_a_mapped_file_may_be_skipped(tmp_path):
    rows = [{"question": f"{n}+1=", "answer": f" {n + 1}"} for n in range(8)]
    del rows[4]["answer"]
    path = write(tmp_path, "d.jsonl", *rows)
    flags = {"map": "prompt=question,completion=answer", "holdout": 0.0}
    assert len(rows_of(path, on_bad_row="skip", **flags).train) == 7
    with pytest.raises(RequestError, match=r"d.jsonl:5` has no column `answer`"):
        rows_of(path, **flags)
    del rows[0]["answer"]  # the first row: --map is wrong
    path = write(tmp_path, "e.jsonl", *rows)
    with pytest.raises(RequestError, match=r"e.jsonl:1` has no column `answer`"):
        rows_of(path, on_bad_row="skip", **flags)


def test_many_bad_rows_at_the_head_are_skipped_where_there_are_good_ones(tmp_path):
    lines = ["{odd", *(json.dumps(row) for row in PAIR[:2]), "{odd", *(json.dumps(row) for row in PAIR)] * 3
    path = write(tmp_path, "d.jsonl", *lines, *(["{odd"] * 1200), *(json.dumps(row) for row in PAIR))
    assert len(rows_of(path, on_bad_row="skip", holdout=0.0).train) == 8 * 3 + 6


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [{"type": "function", "function": "find", "arguments": "{}"}]},
        {"tool_calls": [{"type": "function", "function": ["find"]}]},
        {"function_call": '"find"'},
    ],
)
def test_a_call_whose_function_is_no_object_is_a_bad_row(tmp_path, call):
    bad = [turn("user", "Where?"), {"role": "assistant", "content": None, **call}]
    path = write(tmp_path, "d.jsonl", {"messages": bad}, {"messages": CHATS["one"]})
    with pytest.raises(RequestError, match=r"d.jsonl:1`: the `function` of a tool call in `messages` is a"):
        rows_of(path, holdout=0.0)
    assert len(rows_of(path, holdout=0.0, on_bad_row="skip").train) == 1
    said = {"function_call": '{"name": "find", "arguments": {"what": "key"}}'}  # as text, and right
    good = [turn("user", "Where?"), {"role": "assistant", **said}]
    shown = rows_of(write(tmp_path, "e.jsonl", {"messages": good}), shaped("mistral3")[0], holdout=0.0)
    assert len(shown.train) == 1


def test_a_file_whose_rows_have_weight_0_is_one_without_rows(tmp_path):
    none = write(tmp_path, "none.jsonl", *({**row, "weight": 0} for row in PAIR))
    some = write(tmp_path, "some.jsonl", *PAIR)
    config = settle({"data": (str(none), str(some)), "max_length": 64, "holdout": 0.0})[0]
    rows = load(config, shaped("chatml")[0], "causal", 100_000)
    assert len(rows.train) == 6 and any("have weight 0" in note for note in rows.look.notes)
    with pytest.raises(RequestError, match="weight 0"):
        rows_of(none, holdout=0.0)


def test_a_sequence_to_sequence_model_says_what_it_learns_of_a_conversation(tmp_path):
    path = write(tmp_path, "d.jsonl", *([{"messages": CHATS["two"]}] * 3))
    config = settle({"data": (str(path),), "max_length": 64, "holdout": 0.0})[0]
    rows = load(config, shaped("chatml")[0], "seq2seq", 100_000)
    assert any("learns the last answer" in note for note in rows.look.notes)
    config = replace(config, loss_on="all")
    with pytest.raises(RequestError, match="--loss-on all: this model reads one text"):
        load(config, shaped("chatml")[0], "seq2seq", 100_000)


def test_a_translation_tokenizer_without_a_target_language(tmp_path):
    """NLLB's and mBART's take the source's, M2M100's none."""
    path = write(tmp_path, "d.jsonl", *PAIR)
    config = settle({"data": (str(path),), "max_length": 64, "holdout": 0.0})[0]

    def notes(language, falls_back):
        tokenizer = shaped("chatml")[0]
        tokenizer.src_lang, tokenizer.tgt_lang = "eng_Latn", language

        def switch():
            if tokenizer.tgt_lang is None and not falls_back:
                raise KeyError(None)
            tokenizer.tgt_lang = tokenizer.tgt_lang or tokenizer.src_lang

        tokenizer._switch_to_target_mode, tokenizer._switch_to_input_mode = switch, lambda: None
        return [note for note in load(config, tokenizer, "seq2seq", 100_000).look.notes if "alike" in note]

    (note,) = notes(None, True)
    assert "marks prompts and completions alike as `eng_Latn`" in note
    assert not notes("deu_Latn", True) and not notes("deu_Latn", False)
    with pytest.raises(RequestError, match="marks the language of an answer, and none is set"):
        notes(None, False)
