"""Makes the demo again: its text, its tokenizer, its pretrained model, its fine-tuning data.

    python -m lorafit.demo.build                 # into this folder
    python -m lorafit.demo.build --first 20 --second 20 -o /tmp/demo
    python -m lorafit.demo.build --first-from DIR        # the first stage is not trained again

Everything follows from the seed. What a full build took, and the losses it reached, stand
in README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorafit.demo import FOLDER
from lorafit.demo.world import extracts, ledgers, questions, records, stories

SEED = 7
VOCABULARY = 1024
LENGTH, BATCH = 128, 48  # tokens a row, rows a step
PEAK_RATE = 2e-3
LESSONS = 24  # rows a step of the second stage
MUON_RATE, OTHER_RATE = 2e-2, 1e-3  # of its matrices, and of its embeddings and norms
IGNORED = -100  # a label that is not learned
BEGIN, END, PAD, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TRAIN_ROWS, HELD_OUT_ROWS = 900, 64


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the world's own text, with its chat template and a pad token."""
    random = Random(seed)
    text = list(islice(stories(random), 4000))
    text += [row["messages"][1]["content"] for row in islice(records(random), 1000)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = [PAD, BEGIN, END, USER, ASSISTANT]
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=512,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Twelve Llama blocks, 128 wide, so that low, mid and high are 0-3, 4-8 and 9-11."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.06,  # 0.02 is for models ten times as wide: heads would wake late
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def wake_attention(model: LlamaForCausalLM) -> None:
    """Begin with heads that look for what is like themselves and hand it on: W_q = W_k, W_o = W_v^T,
    each orthogonal (after "Mimetic Initialization of Self-Attention Layers", arXiv:2305.09828).

    From the usual start a model this small learns no copying in the time there is; from this one
    it does within two million tokens, and the task is mostly copying.
    """
    for layer in model.model.layers:
        heads = layer.self_attn
        width = heads.q_proj.weight.shape[0]
        look, hand_on = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
        for weight in (heads.q_proj.weight, heads.k_proj.weight):
            weight.copy_(look + 0.02 * torch.randn(width, width))
        heads.v_proj.weight.copy_(0.5 * hand_on)
        heads.o_proj.weight.copy_(0.5 * hand_on.T)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Token ids (BATCH, LENGTH) without end: stories, lists and conversations, one after the other."""
    random = Random(seed)
    tales, talks, lists = stories(random), questions(random), ledgers(random)
    buffer: list[int] = []
    while True:
        while len(buffer) < BATCH * LENGTH:
            kind = random.random()
            if kind < 0.15:
                text = f"{BEGIN}{next(tales)}{END}"
            elif kind < 0.45:
                text = f"{BEGIN}{next(lists)}{END}"
            else:
                text = str(tokenizer.apply_chat_template(next(talks), tokenize=False))
            buffer += tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, buffer = buffer[: BATCH * LENGTH], buffer[BATCH * LENGTH :]
        yield torch.tensor(ids).view(BATCH, LENGTH)


def lessons(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, labels) (LESSONS, LENGTH) without end: extracts, some conversations and some stories. Of extracts
    the records are learned and of conversations the answers: what people do next is chance, and drowns the rest."""
    random = Random(seed)
    talks, parts, tales = questions(random), extracts(random), stories(random)
    user, assistant = (tokenizer.convert_tokens_to_ids(turn) for turn in (USER, ASSISTANT))
    size, ids, labels = LESSONS * LENGTH, list[int](), list[int]()
    while True:
        while len(ids) < size:
            kind, learned = random.random(), False
            if kind < 0.7:
                read, _, records_of_it = next(parts).partition("\n")
                pieces = [(f"{BEGIN}{read}\n", False), (f"{records_of_it}{END}", True)]
            elif kind < 0.85:
                pieces = [(str(tokenizer.apply_chat_template(next(talks), tokenize=False)), False)]
            else:
                pieces = [(f"{BEGIN}{next(tales)}{END}", True)]
            for text, whole in pieces:
                for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
                    learned = learned and token != user
                    ids.append(token)
                    labels.append(token if whole or learned else IGNORED)
                    learned = learned or token == assistant
        yield torch.tensor(ids[:size]).view(-1, LENGTH), torch.tensor(labels[:size]).view(-1, LENGTH)
        del ids[:size], labels[:size]


def teach(model: LlamaForCausalLM, text: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int) -> None:
    """The second stage: Muon for the blocks' matrices, AdamW for the rest, a short warm-up and a cosine to a tenth."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: tuple[tuple[torch.optim.Optimizer, float], ...] = (
        (torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01), MUON_RATE),
        (
            torch.optim.AdamW(rest, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
            OTHER_RATE,
        ),
    )
    started = time.perf_counter()
    for step in range(1, steps + 1):
        share = min(1.0, step / 20) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * share
        ids, labels = next(text)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps:
            speed = step * LESSONS * LENGTH / (time.perf_counter() - started)
            print(f"lesson {step}/{steps}  loss {loss.item():.3f}  {speed:,.0f} tok/s", flush=True)


def pretrain(model: LlamaForCausalLM, text: Iterator[torch.Tensor], steps: int) -> None:
    """The first stage: AdamW with a linear warm-up and a cosine to a tenth; prints the loss per token."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    started = time.perf_counter()
    for step in range(1, steps + 1):
        warm = min(1.0, step / 60)
        rate = PEAK_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids = next(text)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0 or step == steps:
            speed = step * BATCH * LENGTH / (time.perf_counter() - started)
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {speed:,.0f} tok/s", flush=True)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, text: Iterator[torch.Tensor]) -> float:
    """Mean loss per token over eight batches the training never saw."""
    return float(sum(model(input_ids=ids, labels=ids).loss.item() for ids in islice(text, 8)) / 8)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(folder: Path, first: int, second: int, seed: int = SEED, first_from: Path | None = None) -> None:
    """Write `model/`, `train.jsonl` and `held-out.jsonl` below `folder`, and the model of the first stage into
    `first-stage/`, unless `first_from` has it. The second stage goes on from it as it was saved, in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: dict[str, dict[str, Any]] = {}
    for row in records(Random(seed + 2)):
        seen.setdefault(row["messages"][0]["content"], row)
        if len(seen) == TRAIN_ROWS + HELD_OUT_ROWS:
            break
    rows = list(seen.values())
    write_rows(folder / "train.jsonl", rows[:TRAIN_ROWS])
    write_rows(folder / "held-out.jsonl", rows[TRAIN_ROWS:])

    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    if first_from is None:
        model = make_model(tokenizer)
        wake_attention(model)
        pretrain(model, batches(tokenizer, seed), first)
        first_from = folder / "first-stage"
        model.bfloat16().save_pretrained(first_from)
    model = AutoModelForCausalLM.from_pretrained(first_from, dtype=torch.float32).train()
    teach(model, lessons(tokenizer, seed + 3), second)
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    loss = held_out_loss(model, batches(tokenizer, seed + 1))
    print(f"held-out loss {loss:.3f} per token of the first stage's text, in bfloat16 as saved")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=600, help="steps of the first stage: the language")
    parser.add_argument(
        "--second", type=int, default=240, help="steps of the second stage: reading a sentence"
    )
    parser.add_argument(
        "--first-from", type=Path, help="a model of the first stage, e.g. first-stage/ of a build"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("-o", "--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    build(options.output, options.first, options.second, options.seed, options.first_from)


if __name__ == "__main__":
    main()
