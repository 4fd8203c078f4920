"""A config to the transformers class that loads it, and that class on the meta device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from lorafit.errors import RequestError
from lorafit.model.checkpoint import not_a_language_model
from lorafit.model.source import ModelSource, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def config_of(source: ModelSource) -> PreTrainedConfig:
    """The transformers config. Raises RequestError for a type that transformers does not know."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    data = source.config
    kind: Any = data.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise _unknown_type(source, kind, list(CONFIG_MAPPING.keys()))
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(data))
    except Exception as error:  # a config class may raise anything on values it does not expect
        raise RequestError(
            f"the config of `{source.name}` is no `{kind}` config: {first_line(error)}"
        ) from None


def _unknown_type(source: ModelSource, kind: Any, known: list[str]) -> RequestError:
    """Why a config is refused, and the native type it looks like."""
    names = [str(n) for n in source.config.get("architectures") or []]
    stem = re.sub(r"(For|Model|LMHead).*", "", names[0]).lower() if names else str(kind or "").lower()
    squeezed = {name.replace("_", "").replace("-", ""): name for name in known}
    near = get_close_matches(stem, squeezed, n=1, cutoff=0.7) if stem else []
    like = f"it resembles the native type `{squeezed[near[0]]}`: set `model_type` to it" if near else ""
    if "auto_map" in source.config:
        what = "has no `model_type`" if kind is None else f"is of type `{kind}`, unknown to transformers"
        return RequestError(
            f"the config of `{source.name}` {what} and an `auto_map`: it wants remote code, "
            "which lorafit never runs",
            like or "convert it to a type that transformers has",
        )
    if kind is None:
        return RequestError(f"the config of `{source.name}` names no `model_type`", like)
    return RequestError(f"transformers does not know the model type `{kind}` of `{source.name}`", like)


def _mappings() -> tuple[tuple[str, dict[str, Any]], ...]:
    from transformers.models.auto import modeling_auto as auto

    return (
        ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("seq2seq", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("masked", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    )


def _named(name: str) -> type[PreTrainedModel]:
    """The class of that name in transformers."""
    import transformers

    found: type[PreTrainedModel] = getattr(transformers, name)
    return found


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model: the config's `architectures` decide; without them the first of
    causal, seq2seq, masked that knows the type (masked first for an encoder that is no decoder).

    Raises RequestError when there is none.
    """
    import transformers

    for name in config.architectures or []:
        if what := not_a_language_model(str(name)):
            raise _no_head(str(name), what)
        found = getattr(transformers, name, None)
        if isinstance(found, type) and hasattr(found, "from_pretrained") and hasattr(found, "forward"):
            if _is_bare(name):
                raise _no_head(name, "a bare body")
            return found
    kind = config.model_type
    mappings = dict(_mappings())
    order = ["causal", "seq2seq", "masked"]
    if getattr(config, "is_encoder_decoder", False):  # Pegasus, Marian: their causal class is a decoder alone
        order = ["seq2seq", "causal", "masked"]
    # transformers gives BERT a causal head too, for its use as a decoder; it reads both ways still
    elif kind in mappings["masked"] and not getattr(config, "is_decoder", False):
        order = ["masked", "causal", "seq2seq"]
    for task in order:
        if kind in mappings[task]:
            name = mappings[task][kind]
            return _named(name if isinstance(name, str) else name[0])
    from transformers.models.auto import modeling_auto as auto

    for table in (
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        if kind in table:
            name = table[kind]
            return _named(name if isinstance(name, str) else name[0])
    raise RequestError(f"transformers has no language model of type `{kind}`")


def _is_bare(name: str) -> bool:
    """Whether a class of transformers is a body without a head: in the table of bodies, and in none of
    language models."""
    from transformers.models.auto import modeling_auto as auto

    def names(table: Mapping[str, Any]) -> set[str]:
        return {n for value in table.values() for n in ([value] if isinstance(value, str) else value)}

    tables = [table for _, table in _mappings()]
    tables += [auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES]
    tables += [auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES]
    heads = set().union(*map(names, tables))
    return name in names(auto.MODEL_MAPPING_NAMES) and name not in heads and name.endswith("Model")


def _no_head(name: str, what: str) -> RequestError:
    stem = re.sub(r"(For[A-Z]\w*|Model)$", "", name)
    return RequestError(
        f"its config names `{name}`, {what}: there is no language model head to train with",
        f"name the language model it was made from (its `architectures` is e.g. `{stem}ForCausalLM`)",
    )


def task_of(cls: type, config: PreTrainedConfig) -> str:
    """`causal`, `masked` or `seq2seq`: how a model of that class is trained on text."""
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    for task, table in _mappings():
        names = {n for value in table.values() for n in ([value] if isinstance(value, str) else value)}
        if cls.__name__ in names and task == "masked":
            return "masked"
    masked = re.search(r"ForMaskedLM|ForPreTraining$", cls.__name__)
    return "masked" if masked and not getattr(config, "is_decoder", False) else "causal"


def on_meta(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its shape without a byte of weights.

    Raises RequestError when the class cannot be built from the config.
    """
    import torch
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # a model class may raise anything on a config it does not expect
        raise RequestError(
            f"`{cls.__name__}` cannot be built from this config: {first_line(error)}"
        ) from error
    finally:
        logging.set_verbosity(level)
