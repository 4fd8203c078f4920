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
from lorafit.data.collate import collate_rows, mask_tokens, packed, unpacked
from lorafit.data.dataset import load, prepare
from lorafit.data.files import sources
from lorafit.data.formats import Example, read
from lorafit.data.rows import IGNORED, Row
from lorafit.data.tokenize import Tokens
from lorafit.errors import RequestError, RunError
from lorafit.model.load import load_tokenizer
from lorafit.settings.precedence import settle


def tokens(task="causal", length=64, **more) -> Tokens:
    found = tokenizer(task == "masked")
    prepare(found)
    return Tokens(found, task, length, VOCABULARY, **more)


def examples_of(spec, format="auto", **columns):
    """The format and the examples of the one file of a spec."""
    (source,) = sources(spec)
    found, examples = read(source, format, columns)
    return found, list(examples)


def make(maker: Tokens, examples, format="messages") -> list[Row]:
    return list(maker.rows(examples, format))


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
    row = make(tokens(), [Example("x", messages=tuple(CHAT))], "messages")[0]
    assert learned(row) == "Ada is in the barn.<|end|>Ben is at the market.<|end|>"
    whole = tokenizer().decode(row.ids)
    assert whole == tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert row.prompt == len(tokenizer()("<|begin|><|user|>Where is Ada?<|end|><|assistant|>")["input_ids"])


def test_a_line_break_behind_the_end_token_is_not_the_assistants(tmp_path):
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    row = make(Tokens(mine, "causal", 64, VOCABULARY), [Example("x", messages=tuple(CHAT[:2]))], "messages")[
        0
    ]
    assert learned(row) == "Ada is in the barn.<|end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"
    )
    with pytest.raises(RequestError, match="rewrites earlier turns"):
        make(Tokens(mine, "causal", 64, VOCABULARY), [Example("x", messages=tuple(CHAT))], "messages")


def test_of_a_prompt_in_messages_nothing_is_learned(tmp_path):
    path = write(tmp_path, {"prompt": CHAT[:3], "completion": CHAT[3:]})
    row = make(tokens(), examples_of(path)[1])[0]
    assert learned(row) == "Ben is at the market.<|end|>"


def test_a_default_template_for_a_tokenizer_without_one():
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = None
    maker = Tokens(mine, "causal", 64, VOCABULARY)
    row = make(maker, [Example("x", messages=tuple(CHAT[:2]))], "messages")[0]
    assert learned(row) == "Ada is in the barn.<|end|>" and any(
        "no chat template" in n for n in maker.counts.notes
    )


def test_a_line_separator_within_a_string_ends_no_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one\u2028two\x85three"}\n{"text": "four"}\n', encoding="utf-8")
    assert [e.where.rpartition(":")[2] for e in examples_of(str(path))[1]] == ["1", "2"]


def test_prompt_and_completion():
    row = make(
        tokens(), [Example("x", prompt="Where is Ada?\n", completion="In the barn.")], "prompt-completion"
    )[0]
    assert learned(row) == "In the barn.<|end|>"
    assert tokenizer().decode(row.ids) == "Where is Ada?\nIn the barn.<|end|>"


def test_a_text_is_learned_whole():
    row = make(tokens(), [Example("x", text="Ada went home.")], "text")[0]
    assert (
        row.labels[0] == IGNORED
        and row.supervised == len(row.ids) - 1
        and row.ids[-1] == tokenizer().eos_token_id
    )


def test_a_document_is_cut_into_windows_that_make_it_up():
    text = "Ada carried the lamp to the barn. " * 40
    rows = make(tokens(length=32), [Example("x", text=text)], "document")
    assert "".join(tokenizer().decode(r.ids) for r in rows) in text and all(
        len(r.ids) == 32 for r in rows[:-1]
    )


def test_a_masked_model_learns_the_completion_only():
    maker = tokens("masked")
    row = make(
        maker, [Example("x", prompt="Where is Ada? ", completion="In the barn.")], "prompt-completion"
    )[0]
    assert learned(row, "masked").strip() == "In the barn." and row.ids[0] == 1 and row.ids[-1] == 2
    short = tokens("masked", length=10)
    row = make(
        short, [Example("x", prompt="Where is Ada? " * 9, completion="In the barn.")], "prompt-completion"
    )[0]
    assert len(row.ids) == 10 and row.supervised and short.counts.cut == 1


def test_sequence_to_sequence():
    row = make(tokens("seq2seq"), [Example("x", prompt="Where?", completion="There.")], "prompt-completion")[
        0
    ]
    assert tokenizer().decode(row.ids) == "Where?" and learned(row) == "There."
    with pytest.raises(RequestError, match="reads one text and writes another"):
        make(tokens("seq2seq"), [Example("a.txt", text="plain")], "text")


def test_what_is_cut_and_dropped_is_counted():
    maker = tokens(length=8)
    rows = make(
        maker,
        [Example("a", prompt="word " * 30, completion="x"), Example("b", prompt="a", completion="b " * 30)],
        "prompt-completion",
    )
    assert len(rows) == 1 and len(rows[0].ids) == 8 and (maker.counts.cut, maker.counts.cut_away) == (2, 1)


def test_ids_beyond_the_embedding():
    maker = Tokens(tokenizer(), "causal", 64, 100)
    with pytest.raises(RequestError, match="beyond the model's 100 embeddings"):
        make(maker, [Example("x", text="Ada carried the basket.")], "text")


def test_formats_are_seen(tmp_path):
    rows = {
        "messages": {"messages": CHAT}, "prompt-completion": {"prompt": "a", "completion": "b"}, "text": {"text": "a"},
    }  # fmt: skip
    for name, row in rows.items():
        assert examples_of(write(tmp_path, row, row))[0] == name
    split = {"prompt": CHAT[:1], "completion": CHAT[1:2]}
    assert examples_of(write(tmp_path, split))[1][0].messages == tuple(CHAT[:2])
    (tmp_path / "list.json").write_text(json.dumps([rows["text"]]))
    assert examples_of(str(tmp_path / "list.json"))[0] == "text"
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert examples_of(str(tmp_path / "t.txt"))[0] == "document"
    assert [e.text for e in examples_of(str(tmp_path / "t.txt"), "lines")[1]] == ["one", "two"]


@pytest.mark.parametrize(
    "content, word",
    [
        (b"", "is empty"), (b"  \n\n", "is empty"), (b'{"text": "a"}\n{"text": 3}\n', "data.jsonl:2`: `text` is a number, not a string"),
        (b'{"text": null}\n', "is empty: nothing to learn"), (b'{"text": ""}', "is empty"), (b'{"text": "caf\xe9"}\n', "data.jsonl:1` is not UTF-8"),
        (b'{"text": "a"}\n{"text": \n', "data.jsonl:2` is not valid JSON"), (b"[1]\n", "not a JSON object but a list"), (b'{"txt": "a"}', "not a known data format"),
        (b'{"messages": []}', "data.jsonl:1`: the answer is empty: there are no messages in `messages`"), (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant message in"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "not a string"), (b'{"messages": ["a"]}', "has no `role`"),
        (b'{"prompt": "a", "completion": ""}', "the answer is empty"), (b'{"prompt": 1, "completion": "b"}', "`prompt` is a number"),
        (b'{"text": "a"}\n{"prompt": "a", "completion": "b"}\n', "data.jsonl:2`: `text` is missing"),
        (b"\x00\x00\x00", "not valid JSON"), (b"[" * 100_000, "not valid JSON"), (b"NaN\n", "not a JSON object"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path, content, word):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        examples_of(str(path))
    assert word in error.value.message


def test_what_is_no_data(tmp_path):
    for spec in ("none.jsonl", str(tmp_path), "x"):
        with pytest.raises(RequestError):
            examples_of(spec)
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write("x")
    with pytest.raises(RequestError, match="not a data file"):
        examples_of(str(tmp_path / "a.gz"))


def rows_of(flags: dict) -> object:
    config = replace(settle(flags)[0], max_length=128)
    return load(config, type(tokenizer()).from_pretrained(str(demo.MODEL)), "causal", VOCABULARY)


def test_the_demo_brings_its_own_held_out_rows():
    rows = rows_of({})
    assert (len(rows.train), len(rows.held_out)) == (900, 64) and rows.look.held_out_name == "held-out.jsonl"
    assert not {r.ids for r in rows.train} & {r.ids for r in rows.held_out}


def test_a_share_is_held_out_seeded(tmp_path):
    path = write(tmp_path, *({"text": f"Ada has {n} lamps."} for n in range(100)))
    one, two = rows_of({"data": (path,)}), rows_of({"data": (path,), "seed": 1})
    assert (len(one.train), len(one.held_out)) == (95, 5) and one.held_out.digest != two.held_out.digest
    assert one.held_out.digest == rows_of({"data": (path,)}).held_out.digest
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


def test_a_batch_comes_out_of_one_piece_of_memory_as_it_went_in():
    rows = [Row((1, 2, 3), (IGNORED, 2, 3), "", weights=(0.0, 0.5, 1.0)), Row((4, 5), (IGNORED, 5), "")]
    batch = collate_rows(rows, pad=0, task="causal")
    tensors = [*batch.inputs.values(), batch.labels, batch.places, batch.targets, batch.weights]
    raw = packed(tensors)
    assert raw.numel() == sum(t.nbytes for t in tensors)
    for made, tensor in zip(unpacked(raw, tensors), tensors, strict=True):
        assert torch.equal(made, tensor) and made.dtype == tensor.dtype and made.shape == tensor.shape


def test_collate_pads_on_the_right():
    rows = [Row((5, 6, 7), (IGNORED, 6, 7), "a"), Row((8,), (8,), "b")]
    batch = collate_rows(rows, pad=0, task="causal")
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
    batch = collate_rows(rows, 0, "masked")
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
        format, examples = examples_of(str(path))
        make(tokens(), examples, format)
    except RequestError as error:
        assert error.message


# -- templates like the real ones: none of them marks what the assistant says --------------------

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{{ '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (  # as Mistral's: no words that open an answer
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
THINKING = (  # as Qwen3's: only the last answer shows an empty thought
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENING = (  # as R1's: the words that open an answer hold more than stands there later
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def with_template(template, **more):
    mine = type(tokenizer()).from_pretrained(str(demo.MODEL))
    mine.chat_template = template
    return Tokens(mine, "causal", 512, VOCABULARY, **more)


@pytest.mark.parametrize("template", [CHATML, INST, OPENING])
def test_what_the_assistant_says_is_told_from_the_rest(template):
    (row,) = make(with_template(template), [Example("x", messages=tuple(CHAT))])
    said = learned(row).replace(" Ada", "Ada").replace(" Ben", "Ben")
    assert said == "Ada is in the barn.<|end|>Ben is at the market.<|end|>" and not row.flags


def test_a_template_that_shows_only_the_last_thought():
    (row,) = make(with_template(THINKING), [Example("x", messages=tuple(CHAT))])
    assert learned(row) == "Ada is in the barn.<|end|><think>\n\n</think>\n\nBen is at the market.<|end|>"
    (row,) = make(with_template(THINKING, loss_on="last"), [Example("x", messages=tuple(CHAT))])
    assert learned(row) == "<think>\n\n</think>\n\nBen is at the market.<|end|>"


def test_every_token_or_the_last_answer():
    whole = [Example("x", messages=tuple(CHAT))]
    (row,) = make(with_template(CHATML, loss_on="all"), whole)
    assert row.labels[1:] == row.ids[1:]
    (row,) = make(with_template(CHATML, loss_on="last"), whole)
    assert learned(row) == "Ben is at the market.<|end|>"
    (row,) = make(
        tokens(loss_on="all"), [Example("x", prompt="Where? ", completion="There.")], "prompt-completion"
    )
    assert learned(row) == "? There.<|end|>"  # but the first token, which nothing predicts


def test_tool_calls_and_what_tools_say(tmp_path):
    turns = [
        {"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."},
    ]  # fmt: skip
    path = write(tmp_path, {"messages": turns})
    (row,) = make(with_template(CHATML), examples_of(path)[1])
    said = learned(row)
    assert (
        '"name": "add"' in said
        and said.endswith("It is 2.<|end|>")
        and "1+1" not in said
        and "tool" not in said
    )
    with pytest.raises(RequestError, match="Only user and assistant roles"):
        make(with_template(INST), examples_of(path)[1])


def test_what_is_longer_than_a_row():
    long = Example("f:7", prompt="Ada has ", completion="a lamp and " * 30)
    kinds = {}
    for overflow in ("truncate", "split", "drop"):
        maker = tokens(length=32, overflow=overflow)
        kinds[overflow] = make(maker, [long], "prompt-completion"), maker.counts
    (cut,), counts = kinds["truncate"]
    assert len(cut.ids) == 32 and counts.cut == 1
    parts, counts = kinds["split"]
    whole = make(tokens(length=512), [long], "prompt-completion")[0]
    assert sum((p.ids for p in parts), ()) == whole.ids and counts.split == 1 and len(parts) > 2
    assert all(p.labels[1:] == whole.labels[at * 32 + 1 : at * 32 + 32] for at, p in enumerate(parts))
    assert kinds["drop"][0] == [] and kinds["drop"][1].too_long == 1
    with pytest.raises(RequestError, match=r"`f:7` is \d+ tokens long"):
        make(tokens(length=32, overflow="error"), [long], "prompt-completion")
    (row,) = make(
        tokens("masked", length=32, overflow="split"), [Example("x", text="Ada has a lamp. " * 8)], "text"
    )[:1]
    assert len(row.ids) == 32 and row.ids[0] == 1 and row.ids[-1] == 2
    with pytest.raises(RequestError, match="cannot be split"):
        make(
            tokens("seq2seq", length=8, overflow="split"),
            [Example("x", prompt="Where is Ada? " * 9, completion="b")],
            "prompt-completion",
        )


def test_weights_and_a_template_of_ones_own(tmp_path):
    one = write(tmp_path, *({"text": f"Ada has {n} lamps."} for n in range(20)), name="one.jsonl")
    two = write(tmp_path, *({"text": f"Ben has {n} lamps."} for n in range(20)), name="two.jsonl")
    out = {"eval_data": (write(tmp_path, {"text": "Olga."}, name="out.jsonl"),)}
    rows = rows_of({"data": (f"{one}=2.5", f"{two}=0.25"), **out})
    words = [tokenizer().decode(r.ids) for r in rows.train]
    assert sum("Ada" in w for w in words) == 50 and sum("Ben" in w for w in words) == 5
    assert [s.weight for s in rows.look.sources] == [2.5, 0.25] and rows.look.duplicates == 0
    for flags, match in (
        ({"data": (f"{one}=0",)}, "a weight is above 0"),
        ({"data": (one,), "eval_data": (f"{two}=2",)}, "no weight"),
    ):
        with pytest.raises(RequestError, match=match):
            rows_of(flags)
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role + '> ' + m.content + eos_token }}{% endfor %}"
    )
    chat = write(tmp_path, {"messages": CHAT[:2]}, {"messages": CHAT[2:]}, name="chat.jsonl")
    rows = rows_of({"data": (chat,), "chat_template": str(tmp_path / "t.jinja")})
    assert tokenizer().decode(rows.train[0].ids).startswith("user> Where is")
    for name, content in (
        ("gone.jinja", None),
        ("empty.jinja", b" "),
        ("bad.jinja", b"\xff"),
        ("broken.jinja", b"{% for %}"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RequestError):
            rows_of({"data": (chat,), "chat_template": str(tmp_path / name)})


def test_a_look_before_training(tmp_path):
    said = [{"prompt": f"{n}? ", "completion": f"Ada has {n} lamps."} for n in range(30)]
    path = write(tmp_path, *said, said[4], said[4], {"prompt": "word " * 200, "completion": "x"})
    out = write(tmp_path, said[7], {"prompt": "new? ", "completion": "Yes."}, name="out.jsonl")
    look = rows_of({"data": (path,), "eval_data": (out,)}).look
    assert (look.rows, look.duplicates, look.overlap, look.cut_away, look.cut, look.held_out_rows) == (
        32,
        2,
        1,
        1,
        1,
        2,
    )
    assert look.lengths["min"] <= look.lengths["p50"] <= look.lengths["max"] and look.no_end == 0
    assert (
        look.samples[0].pieces == (("0?", False), (" Ada has 0 lamps.<|end|>", True))
        and look.samples[0].where == "data.jsonl:1"
    )
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    (tmp_path / "t.jinja").write_text(plain)
    chat = write(tmp_path, *({"messages": CHAT[:2]} for _ in range(3)), name="chat.jsonl")
    look = rows_of({"data": (chat,), "chat_template": str(tmp_path / "t.jinja")}).look
    assert look.no_end == look.rows == 2 and look.overlap == 1
    with pytest.raises(RequestError, match="no training row is left: 1 had nothing to learn"):
        rows_of({"data": (write(tmp_path, {"text": "<|end|>"}, name="n.jsonl"),), "eval_data": (out,)})


def test_a_large_file_is_made_into_rows_once(tmp_path, monkeypatch):
    from lorafit import cache
    from lorafit.data import dataset

    path = write(tmp_path, *({"text": f"Ada has {n} lamps."} for n in range(300)))
    small = rows_of({"data": (path,)})
    monkeypatch.setattr(dataset, "STORED_FROM", 1)
    before = {kept.key for kept in cache.kept()}
    one = rows_of({"data": (path,)})
    (key,) = {kept.key for kept in cache.kept()} - before
    entry = cache.folder("rows") / key
    monkeypatch.setattr(dataset, "read", None)  # it is not read again
    two = rows_of({"data": (path,)})
    assert one.train.digest == two.train.digest == small.train.digest and one.look == two.look
    assert [r.ids for r in two.train] == [r.ids for r in small.train] and two.train[5] == small.train[5]
    raw = bytearray((entry / "ids.bin").read_bytes())
    raw[10] ^= 1
    (entry / "ids.bin").write_bytes(bytes(raw))
    monkeypatch.undo()
    monkeypatch.setattr(dataset, "STORED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(entry.parents[2]))
    three = rows_of({"data": (path,)})  # the damaged one is made again
    assert three.train.digest == small.train.digest
    Path(path).write_text(Path(path).read_text().replace("299", "298"))
    assert rows_of({"data": (path,)}).train.digest != small.train.digest  # other content, other rows


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    from lorafit.data import dataset

    path = write(tmp_path, *({"text": f"Ada has {n} lamps."} for n in range(40)))
    monkeypatch.setattr(dataset, "STORED_FROM", 1)
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with pytest.raises(RunError, match="cannot be kept below") as error:
        rows_of({"data": (path,)})
    assert "XDG_CACHE_HOME" in error.value.hint


def test_a_tokenizer_without_any_special_token(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(
        models.WordLevel(
            {w: n for n, w in enumerate(("[U]", "Ada", "has", "lamps", ".", *map(str, range(9))))},
            unk_token="[U]",
        )
    )
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=bare)
    path = write(tmp_path, *({"text": f"Ada has {n} lamps ."} for n in range(9)))
    config = replace(settle({"data": (path,)})[0], max_length=128)
    rows = load(config, bare, "causal", 32)
    assert bare.pad_token_id is not None and rows.look.no_end == rows.look.rows == 8
    batch = collate_rows(list(rows.train[:2]), bare.pad_token_id, "causal")
    assert batch.supervised == 8


def test_rows_from_the_cache_leave_the_default_template_on_the_tokenizer(tmp_path, monkeypatch):
    """The adapter is saved with what it was trained on, and is asked in it."""
    from lorafit import cache
    from lorafit.data import dataset
    from lorafit.data.template import DEFAULT_TEMPLATE

    monkeypatch.setattr(dataset, "STORED_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path, *({"messages": CHAT[:2]} for _ in range(4)))
    plain = write(tmp_path, *({"text": f"Ada has {n} lamps."} for n in range(4)), name="plain.jsonl")
    for _ in range(2):
        for data, template in ((path, DEFAULT_TEMPLATE), (plain, None)):
            tokenizer = load_tokenizer(str(demo.MODEL), "demo")
            tokenizer.chat_template = None
            config = settle({"data": (data,), "max_length": 64})[0]
            load(config, tokenizer, "causal", VOCABULARY)
            assert tokenizer.chat_template == template
    assert len(list(cache.kept())) == 2
