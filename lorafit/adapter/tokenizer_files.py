"""A tokenizer's files: the base's own, byte for byte, and what a run changed.

A tokenizer that transformers 5 writes does not load in transformers 4, which many servers have; the files
that the base came with load wherever the base does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.model import VOCABULARY, load_tokenizer, local_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"

TOKENIZER = ("tokenizer.json", CONFIG, SPECIAL, *VOCABULARY)

TEMPLATES = ("*.jinja", "chat_template.json", "additional_chat_templates")

TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token")


def is_one(path: Path, patterns: tuple[str, ...]) -> bool:
    """Whether a file, or the folder of more templates, has a name of one of these kinds."""
    known = any(fnmatch(path.name, pattern) for pattern in patterns)
    return known and (path.name == "additional_chat_templates" or not path.is_dir())


def files_of_tokenizer(place: str, more: Iterable[str] = ()) -> list[Path]:
    """The files of the tokenizer that `load_tokenizer` reads from that place, as far as they are on this machine; `more`
    are names that its class reads."""
    base, kinds = local_folder(place) if place else None, (*TOKENIZER, *TEMPLATES, *more)
    return [path for path in sorted(base.iterdir()) if is_one(path, kinds)] if base is not None else []


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
    """Write the tokenizer that a run used: the files of the place that `load_tokenizer` read it from as they are, and over them a chat template and special tokens that the run changed.

    Where tokens were added, or the base has no tokenizer files of its own, transformers writes all of it. The names of
    the files. Raises OSError where the folder cannot be written.
    """
    place = tokenizer.name_or_path
    files = files_of_tokenizer(place, tokenizer.vocab_files_names.values())
    own = load_tokenizer(place, place) if files else None
    if own is None or own.get_vocab() != tokenizer.get_vocab():
        return [Path(name).name for name in tokenizer.save_pretrained(folder)]
    new_template = own.chat_template != tokenizer.chat_template
    tokens = {
        name: getattr(tokenizer, name)
        for name in TOKENS
        if getattr(own, name, None) != getattr(tokenizer, name, None)
    }
    for path in files:
        if new_template and is_one(path, TEMPLATES):
            continue
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        else:
            shutil.copyfile(path, folder / path.name)
    if new_template:
        _write_template(folder, tokenizer.chat_template)
    if tokens:
        _change(folder / CONFIG, tokens, must=True)
        _change(folder / SPECIAL, tokens)
    return [path.name for path in files if (folder / path.name).exists()]


def _write_template(folder: Path, template: Any) -> None:
    """A run's own chat template: as a file, and where older versions of transformers look for it.

    Several by name go as they do in transformers: the default into its file, the others into a folder.
    """
    named = template if isinstance(template, dict) else {"default": template} if template else {}
    if "default" in named:
        (folder / "chat_template.jinja").write_text(named["default"], encoding="utf-8")
    for name, text in named.items():
        if name != "default":
            (folder / TEMPLATES[2]).mkdir(exist_ok=True)
            (folder / TEMPLATES[2] / f"{name}.jinja").write_text(text, encoding="utf-8")
    older: Any = (
        [{"name": n, "template": t} for n, t in named.items()] if len(named) > 1 else named.get("default")
    )
    _change(folder / CONFIG, {"chat_template": older}, must=bool(named))


def _change(path: Path, values: Mapping[str, Any], must: bool = False) -> None:
    """Values of a JSON file, changed; the other ones as they are. None removes one."""
    if not path.is_file() and not must:
        return
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name, value in values.items():
        before = data.get(name)
        if value is None:
            data.pop(name, None)
        elif isinstance(before, dict) and "content" in before:
            data[name] = {**before, "content": str(value)}
        else:
            data[name] = value
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
