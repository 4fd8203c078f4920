"""What models say to a prompt: of a row, or of one's own; greedily, or drawn with a seed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lorafit.data import IGNORED, ChatTemplate, Row, collate_rows, end_tokens, last_user_turn
from lorafit.errors import RequestError
from lorafit.evaluate.score import Evaluator, mask_id
from lorafit.forward import Forward, base_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


MOST, OWN = 256, 128  # new tokens at most: of a row's prompt, of one's own


# One token after another, none preferred: what stands in for other settings of a model's generation config, which
# would be those of every setting that is not given.
PLAIN: dict[str, Any] = {
    "num_beams": 1, "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "min_length": 0, "min_new_tokens": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, as ids and as a text to show, what is wanted (empty where nobody said), and how many tokens an
    answer may have. Of a masked model's `labels` those that are not IGNORED are to be filled."""

    ids: tuple[int, ...]
    text: str
    wanted: str
    room: int
    labels: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sampling:
    """Generation settings: temperature 0 is greedy; above it tokens are drawn, by a seed that is the same
    for every model. At most `max_new_tokens`, where it is not 0, and for `max_seconds`, where given."""

    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 0
    max_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Generator:
    """Completions of a model with an adapter on it or without. `positions` is the longest text the model
    takes, 0 for no limit."""

    tokenizer: PreTrainedTokenizerBase
    forward: Forward
    device: torch.device
    positions: int = 0
    sampling: Sampling = Sampling()

    @torch.no_grad()
    def completions(self, model: Any, prompts: Sequence[Prompt]) -> list[str]:
        """What a model says to each prompt, with `…` behind an answer that was cut; a masked model fills its
        masks."""
        model.eval()
        if self.forward.task == "masked":
            return [self._filled(model, prompt) for prompt in prompts]
        return [self._completed(model, prompt, number) for number, prompt in enumerate(prompts)]

    def _completed(self, model: Any, prompt: Prompt, number: int) -> str:
        out = self.generate(model, prompt.ids, prompt.room, number)
        new = out if self.forward.task == "seq2seq" else out[len(prompt.ids) :]
        text = str(self.tokenizer.decode(new, skip_special_tokens=True))
        return text if len(new) and int(new[-1]) in self._ends(model) else f"{text}…"

    def _ends(self, model: Any) -> list[int]:
        """The tokens that end an answer: the tokenizer's, and those that the model's settings name."""
        stated = getattr(base_of(model).generation_config, "eos_token_id", None)  # one, several, or none
        ends = [*end_tokens(self.tokenizer), *(stated if isinstance(stated, list) else [stated])]
        return sorted({end for end in ends if isinstance(end, int)})

    @torch.no_grad()
    def generate(self, model: Any, ids: Sequence[int], room: int, number: int, **more: Any) -> torch.Tensor:
        """The ids of a prompt and its answer (of sequence-to-sequence models the answer's alone), of at most
        `room` new tokens; `number` is added to the seed, `more` are other arguments of transformers' `generate`."""
        from transformers import GenerationConfig

        tokenizer, settled = self.tokenizer, base_of(model).generation_config
        room = self.sampling.max_new_tokens or room
        if self.positions and self.forward.task != "seq2seq":
            room = max(1, min(room, self.positions - len(ids)))
        temperature = self.sampling.temperature
        drawn = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        settings = GenerationConfig(
            max_new_tokens=room,
            max_time=self.sampling.max_seconds,
            do_sample=bool(drawn),
            **{
                name: value
                for name, value in PLAIN.items()
                if getattr(settled, name, None) not in (None, value)
            },
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=self._ends(model) or None,
            decoder_start_token_id=getattr(settled, "decoder_start_token_id", None),
            bos_token_id=tokenizer.bos_token_id,
            **drawn,
        )
        torch.manual_seed(self.sampling.seed + number)
        prompt = torch.tensor([list(ids)], device=self.device)
        mask = torch.ones_like(prompt)
        out: torch.Tensor = model.generate(
            input_ids=prompt, attention_mask=mask, generation_config=settings, **more
        )[0]
        return out

    def _filled(self, model: Any, prompt: Prompt) -> str:
        batch = collate_rows([Row(prompt.ids, prompt.labels, "")], self.tokenizer.pad_token_id or 0, "masked")
        logits_NV = self.forward.logits(model, batch.to(self.device))
        return " · ".join(plain(str(self.tokenizer.decode([t]))) for t in logits_NV.argmax(-1).tolist())


def row_prompts(evaluator: Evaluator, count: int) -> list[Prompt]:
    """The prompts of the first rows, and what is wanted there. Of a conversation the last user turn is shown."""
    read, prompts = evaluator.tokenizer.decode, []
    template = ChatTemplate(evaluator.tokenizer) if evaluator.tokenizer.chat_template else None
    for number, row in enumerate(evaluator.rows[:count]):
        if evaluator.forward.task == "masked":
            row = evaluator.masked(number)
            wanted = " · ".join(plain(str(read([label]))) for label in row.labels if label != IGNORED)
            prompts.append(Prompt(row.ids, str(read(list(row.ids))), wanted, 0, row.labels))
            continue
        asked, reference = _split(row, evaluator.forward.task)
        said = last_user_turn(str(read(asked)), template) if template and row.prompt > 1 else ""
        text = said or str(read(asked, skip_special_tokens=True))
        wanted = str(read(reference, skip_special_tokens=True))
        prompts.append(Prompt(tuple(asked), text, wanted, min(MOST, len(reference) + 24)))
    return prompts


def own_prompts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    positions: int,
    template: ChatTemplate | None = None,
) -> list[Prompt]:
    """Prompts that a person wrote: as a user's turn where the tokenizer has a chat template, else as
    they are. `template` is the chat template with its arguments.

    Raises RequestError for one that is empty or too long, or has no mask for a masked model.
    """
    prompts = []
    for text in texts:
        if not text.strip():
            raise RequestError("--prompt is empty")
        labels: tuple[int, ...] = ()
        if task == "causal" and tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": text}]
            whole = (template or ChatTemplate(tokenizer)).render(turns, opened=True)
            ids = tokenizer(str(whole), add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(text, verbose=False)["input_ids"]
        if task == "causal":  # its end would end what is to go on
            while len(ids) > 1 and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
                ids = ids[:-1]
        if task == "masked":
            mask = mask_id(tokenizer)
            if mask not in ids:
                raise RequestError(
                    f"a masked model fills what is hidden, and `{text}` hides nothing",
                    f"write {tokenizer.mask_token} where it is to guess",
                )
            labels = tuple(mask if i == mask else IGNORED for i in ids)
        if positions and len(ids) >= positions:
            raise RequestError(f"--prompt is {len(ids):,} tokens long, and the model knows {positions:,}")
        prompts.append(Prompt(tuple(ids), text, "", OWN, labels))
    return prompts


def _split(row: Row, task: str) -> tuple[list[int], list[int]]:
    """(prompt, reference) of a row; a text without a prompt is cut after its first quarter."""
    if task == "seq2seq":
        return list(row.ids), [label for label in row.labels if label != IGNORED]
    at = row.prompt
    if at < 2:
        at = max(2, len(row.ids) // 4)
        return list(row.ids[:at]), list(row.ids[at : at + 64])
    stop = at
    while stop < len(row.labels) and row.labels[stop] != IGNORED:
        stop += 1
    return list(row.ids[:at]), list(row.ids[at:stop])


def plain(text: str) -> str:
    """A text on one line, for a table."""
    return re.sub(r"\s+", " ", text).strip()
