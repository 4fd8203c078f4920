"""Presets: a strategy, a band and their settings, as YAML; unknown keys are errors.

A preset names `roles` (or literal `modules`), `layers` (or `layers_to_transform`), LoRA settings
and training defaults. Those of lorafit are in `presets/`; a user's own is given by its path.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from lorafit.errors import RequestError, closest
from lorafit.model import Role
from lorafit.settings.bands import BANDS, Band, LayerChoice
from lorafit.settings.options import whole
from lorafit.settings.run_config import OPTIONS

HERE = Path(__file__).resolve().parent.parent

# In a wheel the presets are in the package (`lorafit/presets` would shadow a module name), else in the checkout.
FOLDERS = (HERE / "_presets", HERE.parent / "presets")

LONGEST = 1_000_000  # bytes of the largest YAML file that is read


STARTS = ("pissa", "olora", "corda", "lora_ga")  # the words that PEFT's names for them begin with


def takes_from_base(init: Any) -> bool:
    """Whether an `init_lora_weights` takes a part out of the base's weights."""
    return isinstance(init, str) and init.lower().startswith(STARTS)


@dataclass(frozen=True, slots=True)
class Lora:
    """LoRA's settings, named as in PEFT except for `alpha` and `dropout`."""

    r: int = 16
    alpha: float = 32
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    bias: str = "none"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    modules_to_save: tuple[str, ...] = ()

    @property
    def saved_rank(self) -> int:
        """The largest rank in the adapter's file: twice the trained one where its start is taken off (adapter/start)."""
        return max([self.r, *self.rank_pattern.values()]) * (
            2 if takes_from_base(self.init_lora_weights) else 1
        )


@dataclass(frozen=True, slots=True)
class Preset:
    """The content of a preset file. `roles` or `modules` is set, never both."""

    name: str
    description: str
    roles: tuple[Role, ...]
    modules: tuple[str, ...] = ()
    layers: str = "all"
    lora: Lora = Lora()
    training: Mapping[str, Any] = field(default_factory=dict)
    bands: Mapping[str, Band | str] = field(default_factory=dict)
    path: str = ""

    def choice(self, layers: str | None = None) -> LayerChoice:
        """The given choice of layers, or the preset's own; the preset's bands are known."""
        return LayerChoice(self.layers if layers is None else layers, self.bands)

    def with_modules(self, modules: Iterable[str]) -> Preset:
        """The same settings for literal module names instead of roles."""
        names = tuple(modules)
        return replace(self, name="+".join(names), roles=(), modules=names)


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (a small file could expand without end) and without duplicate keys. `1e-4` is a number,
    `off` and `on` are words, and a date is a text, as YAML 1.2 has them."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key `{key.value}` appears twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _as_in_1_2() -> None:
    """Give the loader its own forms of numbers, truths and dates."""
    numbers, truths, dates = (f"tag:yaml.org,2002:{kind}" for kind in ("float", "bool", "timestamp"))
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in (numbers, truths, dates)]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    number = r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    _Loader.add_implicit_resolver(numbers, re.compile(f"^({number})$"), list("-+0123456789."))
    truth = re.compile("^(true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO)$")
    _Loader.add_implicit_resolver(truths, truth, list("tTfFyYnN"))


_as_in_1_2()


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; tags and aliases are refused.

    Raises RequestError with the file, and the line where it is known.
    """
    try:
        if path.stat().st_size > LONGEST:
            raise RequestError(f"{what} `{path}` is larger than {LONGEST:,} bytes")
        text = path.read_text(encoding="utf-8")
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise RequestError(f"cannot read {what} `{path}`: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{what} `{path}` is not UTF-8 (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or "not a YAML file"
        if isinstance(error, (yaml.scanner.ScannerError, yaml.parser.ParserError)):
            why = f"it is not valid YAML: {why}"
        raise RequestError(f"{what} `{path}{where}`: {why}") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{what} `{path}` cannot be read: {error}") from None
    if data is None:
        raise RequestError(f"{what} `{path}` is empty")
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise RequestError(f"{what} `{path}` is not a mapping of names to values")
    return data


def preset_names() -> tuple[str, ...]:
    """The presets that come with lorafit, the smallest first."""
    order = ("basic", "attention", "extended", "ffn", "all")
    found = {path.stem for folder in FOLDERS if folder.is_dir() for path in folder.glob("*.yaml")}
    return tuple(sorted(found, key=lambda n: (order.index(n) if n in order else 99, n)))


def load_preset(name_or_path: str) -> Preset:
    """A preset by its name, or by the path of a YAML file.

    Raises RequestError: no such preset or file, or anything in it that is unknown or of the
    wrong type, all such faults at once.
    """
    text = str(name_or_path)
    looks_like_path = text.endswith((".yaml", ".yml")) or "/" in text or os.sep in text
    if looks_like_path:
        path = Path(text).expanduser()
        if not path.is_file():
            raise RequestError(f"there is no preset file `{text}`", "see `lorafit presets`")
        return parse(read_yaml(path, "preset"), path.stem, str(path.resolve()))
    for folder in FOLDERS:
        if text and (folder / f"{text}.yaml").is_file():
            return parse(read_yaml(folder / f"{text}.yaml", "preset"), text)
    if Path(text).expanduser().is_file():
        raise RequestError(
            f"`{text}` is not a preset: a preset is a .yaml file", "see `lorafit help presets`"
        )
    raise RequestError(f"there is no preset `{text}`", closest(text, preset_names()))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9


def _words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


def _layers(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _indices(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    )


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _pattern(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(_regex(k) and holds(v) for k, v in value.items())

    return check


def _regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


def _share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


Schema = Mapping[str, tuple[Callable[[Any], bool], str]]

TOP: Schema = {
    "description": (_text, "a text"),
    "roles": (_words, "a list of roles"),
    "modules": (_words, "a list of module names"),
    "layers": (_layers, "a choice of layers, e.g. `high` or `0-3`"),
    "layers_to_transform": (_indices, "a list of layer numbers"),
    "lora": (_mapping, "a mapping"),
    "training": (_mapping, "a mapping"),
    "bands": (_mapping, "a mapping of names to a choice of layers or to two fractions"),
}

LORA: Schema = {
    "r": (whole(1).holds, "a whole number above 0"),
    "alpha": (_number, "a number above 0"),
    "dropout": (_share, "a number from 0 up to 1"),
    "use_rslora": (_flag, "true or false"),
    "use_dora": (_flag, "true or false"),
    "init_lora_weights": (
        lambda v: v in (True, False, "gaussian", "pissa", "olora", "orthogonal"),
        "true, false, gaussian, pissa, olora or orthogonal",
    ),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "rank_pattern": (_pattern(_whole), "a mapping of patterns to ranks"),
    "alpha_pattern": (_pattern(_number), "a mapping of patterns to alphas"),
    "modules_to_save": (_words, "a list of module names"),
}


TRAINING: Schema = {
    name: (option.kind.holds, option.kind.takes) for name, option in OPTIONS.items() if option.training
}


def check(data: Mapping[str, Any], schema: Schema, where: str) -> list[str]:
    """One line for each key that is unknown or of the wrong type."""
    faults = []
    for key, value in data.items():
        if not isinstance(key, str):
            faults.append(f"`{where}{key}` is not a name")
        elif key not in schema:
            faults.append(f"unknown key `{where}{key}`: {closest(key, schema)}")
        elif not schema[key][0](value):
            faults.append(f"`{where}{key}` is {value!r}: it takes {schema[key][1]}")
    return faults


def parse_roles(words: Iterable[str]) -> tuple[tuple[Role, ...], list[str]]:
    """The roles, each once and in order, and an error line for each unknown word."""
    known = {role.value: role for role in Role}
    faults = [f"`{w}` is not a role: {closest(w, known)}" for w in words if w not in known]
    return tuple(role for role in Role if role.value in set(words)), faults


def _bands(data: Mapping[str, Any], faults: list[str]) -> dict[str, Band | str]:
    found: dict[str, Band | str] = {}
    for name, value in data.items():
        if name in BANDS:
            faults.append(f"band `{name}` is built in: choose another name")
        elif isinstance(value, str):
            try:
                LayerChoice(value)
                found[name] = value
            except RequestError as error:
                faults.append(f"band `{name}`: {error.message}")
        elif (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
            and 0 <= value[0] < value[1] <= 1
        ):
            start, stop = (Fraction(str(v)) for v in value)
            found[name] = Band(name, start, stop)
        else:
            faults.append(
                f"band `{name}` is {value!r}: it takes a choice of layers, or two fractions of the depth"
            )
    return found


def parse(data: Mapping[str, Any], name: str, path: str = "") -> Preset:
    """The preset in a mapping. Raises RequestError with all its errors, one per line."""
    if path and ("origin" in data or {"model", "data", "preset"} & data.keys()):
        raise RequestError(f"`{path}` is a run file, not a preset", f"--config {shlex.quote(path)}")
    faults = check(data, TOP, "")
    lora = data.get("lora") or {}
    training = data.get("training") or {}
    faults += check(lora, LORA, "lora.") if isinstance(lora, dict) else []
    faults += check(training, TRAINING, "training.") if isinstance(training, dict) else []
    for one, other in (("roles", "modules"), ("layers", "layers_to_transform")):
        if one in data and other in data:
            faults.append(f"`{one}` and `{other}` exclude each other: keep one")
    if "roles" not in data and "modules" not in data:
        faults.append("neither `roles` nor `modules` is set: nothing would be adapted")
    roles: tuple[Role, ...] = ()
    if _words(data.get("roles")):
        roles, wrong = parse_roles(data["roles"])
        faults += wrong
    bands = _bands(data["bands"], faults) if isinstance(data.get("bands"), dict) else {}
    layers = str(data.get("layers", "all"))
    if _indices(data.get("layers_to_transform")):
        layers = ",".join(str(index) for index in sorted(set(data["layers_to_transform"])))
    try:
        LayerChoice(layers, bands)
    except RequestError as error:
        faults.append(f"layers: {error.message}")
    if faults:
        shown = path or f"preset `{name}`"
        lines = faults[0] if len(faults) == 1 else "".join(f"\n  {fault}" for fault in faults)
        raise RequestError(f"{shown}: {lines}", "`lorafit help presets` shows what a preset may contain")
    settings = {**lora}
    if "modules_to_save" in settings:
        settings["modules_to_save"] = tuple(settings["modules_to_save"])
    return Preset(
        name=name,
        description=str(data.get("description", "")),
        roles=roles,
        modules=tuple(data.get("modules") or ()),
        layers=layers,
        lora=Lora(**settings),
        training=dict(training),
        bands=bands,
        path=path,
    )
