"""`lorafit chat`: streamed answers, several turns, the base beside the adapter."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

ASKED = "Anton broke the small key on the bridge."


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the demo."""
    from lorafit.cli import app

    folder = tmp_path_factory.mktemp("chat") / "run"
    words = [
        "--preset",
        "ffn",
        "--layers",
        "high",
        "--max-steps",
        "40",
        "-o",
        str(folder),
        "-q",
        "--no-sample",
    ]
    with pytest.raises(SystemExit) as end:
        app(["train", *words])
    assert end.value.code == 0
    return folder


@pytest.fixture
def talk(run, monkeypatch):
    """`lorafit chat …` with these lines on stdin."""

    def call(lines, *words):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run("chat", *words)

    return call


def opened(folder, **more):
    from lorafit.cli.chat import _opened

    return _opened({}, str(folder), None, "", (0.0, 0, 48), None, **more)[0]


def test_answers_are_those_of_eval_for_base_and_adapter(trained, talk, run):
    done = talk([ASKED, "/base", f"/base {ASKED}"], trained, "--json")
    assert done.code == 0, done.err
    turns = done.document["turns"]
    assert [t["of"] for t in turns] == ["adapter", "base", "base"] and not any(t["stopped"] for t in turns)
    sample = run("eval", trained, "--prompt", ASKED, "--samples", 0, "--json").document["samples"][0]
    assert turns[0]["answer"] == sample["adapters"][0] and turns[1]["answer"] == sample["base"]
    assert turns[1]["answer"] != turns[0]["answer"], "the base says something else"


def test_piped_lines_are_turns_and_stdout_is_the_answers(trained, talk):
    lines = ["", ASKED, "/reset", ASKED, "/nonsense", "/help", "/quit", "not read"]
    done = talk(lines, trained)
    one, two = done.out.splitlines()
    assert done.code == 0 and one == two != "", "forgotten, the same question has the same answer"
    assert "forgotten" in done.err and "no command /nonsense" in done.err and "> " not in done.out
    assert talk([ASKED], trained, "-q").err == ""


@pytest.mark.parametrize("extra", ["lm_head.weight", "embed_tokens.weight"])
def test_the_base_is_asked_where_it_stays_as_it_was(trained, talk, tmp_path, extra):
    """PEFT keeps the base's own of what is in `modules_to_save`; other weights in the file stay in the base."""
    from safetensors.torch import load_file, save_file

    from lorafit import demo

    folder = tmp_path / "a"
    folder.mkdir()
    config = json.loads((trained / "adapter_config.json").read_text())
    config["modules_to_save"] = ["lm_head"] if "head" in extra else None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(trained / "adapter_model.safetensors")
    embedding = load_file(next(demo.MODEL.glob("*.safetensors")))["model.embed_tokens.weight"].float() * 1.5
    where = (
        "base_model.model.lm_head.weight" if "head" in extra else "base_model.model.model.embed_tokens.weight"
    )
    save_file({**tensors, where: embedding}, folder / "adapter_model.safetensors", {"format": "pt"})
    done = talk([ASKED, "/base"], folder, "--model", "demo", "--json", "--max-new-tokens", 3)
    if "head" in extra:
        assert done.code == 0 and [turn["of"] for turn in done.document["turns"]] == ["adapter", "base"], (
            done.err
        )
    else:
        assert done.code == 2 and "the adapter's file holds weights of it" in done.err, done.err


def test_what_is_forgotten_is_not_asked_of_the_base(trained, talk):
    done = talk([ASKED, "/base", "/reset", "/base"], trained, "--json", "--max-new-tokens", 3)
    assert done.code == 2 and "nothing was asked yet" in done.err
    assert [turn["prompt"] for turn in done.document["turns"]] == [ASKED, ASKED]


def test_input_that_is_not_utf_8_is_named_with_its_line(trained, run, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", stdin)
    done = run("chat", trained)
    assert done.code == 2 and "line 1 of the input" in done.err and "iconv" in done.err


def test_a_line_that_is_refused_leaves_the_answers_before_it(trained, talk):
    done = talk([ASKED, "lamp " * 3000], trained, "--json", "--max-new-tokens", 4)
    assert done.code == 2 and "tokens, and the model takes" in done.err
    (turn,) = done.document["turns"]
    assert turn["prompt"] == ASKED and turn["answer"]


def test_a_closed_stdin_is_the_end_of_the_conversation(trained, run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    done = run("chat", trained, "--json")
    assert done.code == 0 and done.document["turns"] == []


def test_a_conversation_goes_through_the_chat_template(trained):
    chat = opened(trained)
    first = "".join(chat.ask(ASKED))
    assert [t["role"] for t in chat.turns] == ["user", "assistant"] and chat.turns[1]["content"] == first
    text = chat.generator.tokenizer.decode(chat._fitted("And Mara?"))
    assert text.index(ASKED) < text.index(first) < text.index("And Mara?")
    before = list(chat.turns)
    again = "".join(chat.ask_base())
    assert chat.turns == before and again != first, "the base is no part of the conversation"
    alone = opened(trained)
    assert chat._ids([], ASKED) == alone._ids([], ASKED)


def test_the_system_message_stands_first(trained):
    chat = opened(trained)
    chat.system = "You write JSON."
    text = chat.generator.tokenizer.decode(chat._fitted(ASKED))
    assert text.index("You write JSON.") < text.index(ASKED)


def test_answers_come_in_pieces_and_stop_with_their_reader(trained):
    chat = opened(trained)
    pieces = chat.ask(ASKED)
    first = next(pieces)
    pieces.close()
    assert chat.turns[1]["content"] == first and len(chat.turns) == 2, "what was said counts"
    whole = list(opened(trained).ask(ASKED))
    assert len(whole) > 3 and whole[0] == first


def test_the_oldest_turns_go_where_there_is_no_room(trained):
    from dataclasses import replace

    from lorafit.errors import RequestError

    chat = opened(trained)
    for who in ("Ada", "Otto", "Mara"):
        list(chat.ask(f"{who} broke the key."))
    sampling = replace(chat.generator.sampling, max_new_tokens=1)
    most = len(chat._fitted(ASKED)) - 5
    chat.generator = replace(chat.generator, positions=most, sampling=sampling)
    ids = chat._fitted(ASKED)
    text = chat.generator.tokenizer.decode(ids)
    assert len(ids) < most and chat.forgotten == 2
    assert "Ada broke" not in text and "Otto broke" in text and "Mara broke" in text
    assert len(chat.turns) == 6, "they are kept"
    chat.generator = replace(chat.generator, positions=4)
    with pytest.raises(RequestError, match="and the model takes 4"):
        chat._fitted(ASKED)


@pytest.fixture
def without_template(tiny, tmp_path):
    """A model whose tokenizer has no chat template."""
    from transformers import AutoTokenizer

    shutil.copytree(tiny("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("chat_template*", "token*"))
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_a_model_without_a_template_continues_text(without_template, talk):
    done = talk(["Ada lent", r"a\nb"], without_template, "--max-new-tokens", 5, "--json")
    assert done.code == 0 and "plain text" in done.err, done.err
    assert [t["prompt"] for t in done.document["turns"]] == ["Ada lent", "a\nb"]
    assert {t["of"] for t in done.document["turns"]} == {"model"}
    assert talk(["/base"], without_template).err.count("this is the base") == 1
    for words, flag in ((("--system", "s"), "--system"), (("--no-plain",), "--no-plain")):
        refused = talk(["x"], without_template, *words)
        assert refused.code == 2 and f"{flag} needs a chat template, and" in refused.err
        assert "add --no-plain" not in refused.err


def test_a_run_on_plain_pairs_is_asked_as_it_was_trained(talk, pairs, run, tmp_path):
    words = ("--data", pairs, "--max-steps", 1, "--no-sample", "-q")
    for name, more in (("plain", ()), ("chat", ("--as-chat",))):
        assert run("train", *words, *more, "-o", tmp_path / name).code == 0
        done = talk(["x"], tmp_path / name, "--max-new-tokens", 1)
        assert ("plain text" in done.err) == (name == "plain"), done.err
    assert "chat template" in talk(["x"], tmp_path / "plain", "--no-plain", "--max-new-tokens", 1).err
    refused = talk(["x"], tmp_path / "plain", "--system", "s")
    assert refused.code == 2 and "add --no-plain" in refused.err


def test_sequence_to_sequence_models_answer(tiny, talk, tmp_path):
    """One token after another, whatever their generation config has: beams cannot be streamed."""
    shutil.copytree(tiny("t5"), tmp_path / "beams")
    config = tmp_path / "beams" / "generation_config.json"
    known = json.loads(config.read_text()) if config.is_file() else {}
    config.write_text(
        json.dumps({**known, "num_beams": 4, "no_repeat_ngram_size": 1, "repetition_penalty": 9.0})
    )
    words = ("--max-new-tokens", 8, "--json")
    plain, beams = (talk(["Ada lent"], place, *words).document for place in (tiny("t5"), tmp_path / "beams"))
    assert plain["turns"] == beams["turns"]
    assert len(talk(["Ada", "Otto"], tiny("t5"), "--max-new-tokens", 4, "--json").document["turns"]) == 2


def test_a_merged_folder_says_what_its_adapter_says(trained, talk, run, tmp_path):
    assert run("merge", trained, "-o", tmp_path / "m", "--no-verify").code == 0
    answers = [
        talk([ASKED], place, "--json").document["turns"][0]["answer"] for place in (trained, tmp_path / "m")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("words, named", [(("nowhere",), "`nowhere`"), ((), "missing argument")])
def test_what_cannot_be_talked_to(talk, words, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = talk(["x"], *words)
    assert done.code == 2 and named in done.err and done.out == ""


def test_masked_models_do_not_chat(tiny, talk):
    done = talk(["x"], tiny("bert"))
    assert done.code == 2 and "masked model" in done.err


@pytest.fixture
def endless(without_template):
    """A model that knows no end token, and has room for a million tokens."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        path = without_template / name
        if path.is_file():
            found = json.loads(path.read_text())
            for key in ("eos_token_id", "eos_token", "sep_token"):
                found.pop(key, None)
            found |= {"eos_token_id": None, "max_position_embeddings": 10**6} if name == "config.json" else {}
            path.write_text(json.dumps(found))
    return without_template


class Typed:
    """`lorafit chat …` on a terminal of its own."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        command = [sys.executable, "-m", "lorafit", "chat", *map(str, words)]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # in the background it is ignored
        )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def read_until(self, pattern, seconds=90.0):
        end = time.monotonic() + seconds
        while not re.search(pattern, self.seen):
            assert time.monotonic() < end and self.process.poll() is None, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                self.seen += os.read(self.master, 4096)

    def read_to_the_end(self):
        code = self.process.wait(30)
        while select.select([self.master], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:  # the other side is closed
                break
        return code


def test_ctrl_c_stops_an_answer_and_at_the_prompt_the_chat(endless):
    with Typed(endless, "--max-new-tokens", "900000") as chat:
        chat.read_until(rb"> ")
        os.write(chat.master, b"Anton runs.\n")
        chat.read_until(rb"runs\.\r?\n")
        time.sleep(1)  # it speaks now
        chat.process.send_signal(signal.SIGINT)
        chat.read_until(rb"stopped(.|\n)*> ")
        for _ in range(15):  # one between the prompt and the wait for a key is not seen by readline
            chat.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                chat.process.wait(2)
                break
        assert chat.process.wait(1) == 0 and b"Traceback" not in chat.seen and b"error" not in chat.seen


def test_what_is_loaded_is_said_on_a_terminal_and_ctrl_c_ends_it_with_a_word(trained, talk):
    with Typed(trained) as chat:
        chat.read_until(rb"loading .*run\r?\n")  # before torch is imported, which takes more than a second
        assert b"/reset" not in chat.seen
        chat.process.send_signal(signal.SIGINT)
        assert chat.read_to_the_end() == 130
        assert b"interrupted" in chat.seen and b"Traceback" not in chat.seen, chat.seen
    assert "loading" not in talk([ASKED], trained, "--max-new-tokens", "1").err
    with Typed(trained, "--json") as chat:
        chat.read_until(rb"> ")
        assert b"/reset" in chat.seen and b"loading" not in chat.seen


def test_the_base_is_asked_the_last_question_also_in_plain_text(talk, pairs, run, tmp_path):
    words = ("--data", pairs, "--max-steps", 1, "--no-sample", "-q", "-o", tmp_path / "r")
    assert run("train", *words).code == 0
    lines = ["/base", "Ada lent", "/base", "Otto lost", "/base", "/base Mara"]
    first = talk(lines[:1], tmp_path / "r")
    assert first.code == 2 and "nothing was asked yet" in first.err
    turns = talk(lines[1:], tmp_path / "r", "--max-new-tokens", 3, "--json").document["turns"]
    asked = [
        ("Ada lent", "adapter"),
        ("Ada lent", "base"),
        ("Otto lost", "adapter"),
        ("Otto lost", "base"),
        ("Mara", "base"),
    ]
    assert [(t["prompt"], t["of"]) for t in turns] == asked
    alone = talk(["Ada lent", "Otto lost"], "demo", "--plain", "--max-new-tokens", 3, "--json").document[
        "turns"
    ]
    assert [turns[1]["answer"], turns[3]["answer"]] == [t["answer"] for t in alone]


def test_a_base_that_an_adapter_leaves_changed_is_not_asked(tiny, pairs, run, talk, tmp_path):
    """Trained biases stay in the model while the adapter is off."""
    (tmp_path / "biased.yaml").write_text("roles: [q, v]\nlora: {bias: all}\n")
    words = ("--data", pairs, "--preset", tmp_path / "biased.yaml", "--max-steps", 1, "--no-sample", "-q")
    assert run("train", tiny("gpt2"), *words, "-o", tmp_path / "r").code == 0
    assert talk(["Ada"], tmp_path / "r", "--max-new-tokens", 2).code == 0
    done = talk(["Ada", "/base"], tmp_path / "r", "--max-new-tokens", 2)
    assert done.code == 2 and "the adapter trains biases, which stay in it" in done.err


def test_a_conversation_leaves_room_for_an_answer(trained):
    from dataclasses import replace

    chat = opened(trained)
    for _ in range(4):
        list(chat.ask(ASKED))
    whole = len(chat._fitted(ASKED))
    chat.generator = replace(chat.generator, positions=whole + 10)
    most = chat.generator.sampling.max_new_tokens
    assert most == 48 and len(chat._fitted(ASKED)) + most <= whole + 10 and chat.forgotten == 2
