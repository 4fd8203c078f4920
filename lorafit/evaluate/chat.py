"""A conversation with a model: its answers as they are generated, by the adapter or by the bare base."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from lorafit.data import ChatTemplate
from lorafit.errors import RequestError
from lorafit.evaluate.generate import Generator

Turn = dict[str, str]

ROOM = 512  # new tokens of an answer, at most


class _Asked(StoppingCriteria):
    """Ends an answer once somebody asks for it."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **extra: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


@dataclass(slots=True)
class Chat:
    """A conversation through a chat template; without one, each text is continued on its own.

    `model` has an adapter on it where `adapted`. `turns` is what was said so far, without the system's part. `apart` is
    why the base cannot be asked beside the adapter; empty where it can.
    """

    generator: Generator
    model: Any
    template: ChatTemplate | None
    adapted: bool = True
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    forgotten: int = 0  # turns that no longer fitted
    answers: int = 0
    apart: str = ""
    asked: str = ""  # the last question

    def ask(self, text: str) -> Iterator[str]:
        """The pieces of the answer, as they come; it becomes part of the conversation, also where the reader
        stops early.

        Raises RequestError where the text is too long for the model, or the template refuses it.
        """
        ids, said, self.asked = self._fitted(text), "", text
        try:
            for piece in self._generated(ids):
                said += piece
                yield piece
        finally:
            if self.template is not None:
                self.turns += [_turn("user", text), _turn("assistant", said)]

    def forget(self) -> None:
        """Start a new conversation: earlier questions and answers are forgotten."""
        self.turns.clear()
        self.asked = ""

    def ask_base(self, text: str = "") -> Iterator[str]:
        """What the model without its adapter says to a text, or to the last question again. It is no part of the
        conversation.

        Raises RequestError where there is no last question, and as `ask` does.
        """
        before = self.turns
        if self.apart:
            raise RequestError(f"the base cannot be asked here: {self.apart}", "lorafit chat MODEL asks it")
        if not text and not self.asked:
            raise RequestError("nothing was asked yet", "/base TEXT asks the base")
        try:
            if not text:  # again, without its answer
                self.turns, text = before[:-2], self.asked
            ids = self._fitted(text)
        finally:
            self.turns = before
        with self.model.disable_adapter() if self.adapted else nullcontext():
            yield from self._generated(ids)

    def _fitted(self, text: str) -> list[int]:
        """The conversation and the text as ids, the oldest turns left out as far as they and an answer do not fit."""
        turns, most = list(self.turns), self.generator.positions
        answer = min(self.generator.sampling.max_new_tokens or ROOM, most // 4)
        while True:
            ids = self._ids(turns, text)
            if not most or len(ids) + answer <= most or (not turns and len(ids) < most):
                self.forgotten += len(self.turns) - len(turns)
                return ids
            if not turns:
                raise RequestError(
                    f"that is {len(ids):,} tokens, and the model takes {most:,} with its answer"
                )
            turns = turns[2:]

    def _ids(self, turns: list[Turn], text: str) -> list[int]:
        tokenizer = self.generator.tokenizer
        if self.template is None:
            ids = list(tokenizer(text, verbose=False)["input_ids"])
            ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
            while self.generator.forward.task == "causal" and len(ids) > 1 and ids[-1] in ends:
                ids.pop()
            return ids
        head = [_turn("system", self.system)] if self.system else []
        try:
            whole = self.template.render([*head, *turns, _turn("user", text)], opened=True)
        except Exception as error:  # a template may raise anything
            why = str(error).splitlines()
            raise RequestError(
                f"the chat template refuses it: {why[0] if why else type(error).__name__}",
                "without --system" if self.system else "--plain continues plain text",
            ) from None
        return list(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])

    def _generated(self, ids: list[int]) -> Iterator[str]:
        """The pieces of what the model says behind these ids, generated beside the reader, and stopped with it."""
        stop, failed = _Asked(), list[BaseException]()
        tokenizer: Any = self.generator.tokenizer
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.answers += 1

        def generate() -> None:
            try:
                self.generator.generate(
                    self.model,
                    ids,
                    ROOM,
                    self.answers,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
            except BaseException as error:
                failed.append(error)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stop.event.set()
            thread.join()
        if failed:
            raise failed[0]


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
