"""An adapter or a model as a GGUF file: llama.cpp's own converter is run, and what it wrote is read back."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.adapter import check_converted, common_base, locate, modules_of, named_alone, read_config
from lorafit.errors import RequestError, RunError
from lorafit.model import base_folder, local_folder, split_revision, weight_files
from lorafit.operations.options import GGUF_TYPES
from lorafit.report import Adapted, why_not_gguf, why_not_merged_gguf
from lorafit.results import ExportReport
from lorafit.settings import Lora

if TYPE_CHECKING:
    from lorafit.model import ModelMap, ModelSource

ADAPTERS, MODELS = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"  # llama.cpp's programs
PLACE = "LLAMA_CPP"  # the environment variable that names its folder
CLONE = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"

# run with the converter's own `gguf` package on its path
READ_BACK = """
import json, sys
from gguf import GGUFReader
found = GGUFReader(sys.argv[1])
value = lambda name: None if found.get_field(name) is None else found.get_field(name).contents()
print(json.dumps([value("general.type"), value("adapter.lora.alpha"), [t.name for t in found.tensors]]))
"""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be converted, to which file, by which program; `program` is None where it is not on this machine."""

    place: str
    target: Path
    program: Path | None
    arguments: tuple[str, ...]
    adapted: Adapted | None
    hub: ModelSource | None = None  # a model whose files may not be on this machine yet

    @property
    def download(self) -> list[str]:
        """The command that gets the model's weights; empty where they are on this machine."""
        if self.hub is None:
            return []
        folder = local_folder(self.hub.place)
        if folder is not None and weight_files(folder):
            return []
        name, revision = split_revision(self.hub.place)
        return ["hf", "download", name, *(["--revision", revision] if revision else [])]

    def command(self, target: Path | None = None) -> list[str]:
        """The converter's command line."""
        program = str(self.program or Path("llama.cpp") / (ADAPTERS if self.adapted else MODELS))
        return [
            sys.executable if self.program else "python",
            program,
            *self.arguments,
            "--outfile",
            str(target or self.target),
        ]


def prepare_export(
    place: str,
    *,
    to: str = "gguf",
    model: str | None = None,
    output: str | None = None,
    outtype: str | None = None,
    llama_cpp: str | None = None,
    overwrite: bool = False,
) -> Conversion:
    """What `lorafit export` does with these arguments. Raises RequestError for what llama.cpp does not read, or a file
    that may not be replaced."""
    if to != "gguf":
        raise RequestError(f"--to is `{to}`: it takes gguf")
    if outtype is not None and outtype not in GGUF_TYPES:
        raise RequestError(f"--outtype is `{outtype}`: it takes one of {', '.join(GGUF_TYPES)}")
    adapted: Adapted | None = None
    hub: ModelSource | None = None
    if named_alone(place, model):
        from lorafit.model import chart_of, find

        source = find(place)
        found = chart_of(source)
        hub = None if source.local else source
        arguments = [str(local_folder(source.place) or source.place)]
    else:
        folder = locate(place)
        source, found = common_base([folder], model)
        adapted = adapted_of(folder, found)
        base = local_folder(source.place)  # also of a hub model, of which it reads the config alone
        named = ["--base", str(base)] if base is not None else ["--base-model-id", source.place]
        arguments = [str(Path(folder).expanduser()), *named]
    why = (
        why_not_gguf(adapted, found.family, found.task)
        if adapted
        else why_not_merged_gguf(found.family, found.task)
    )
    if not why and source.name == "demo":
        why = "it does not know the demo's tokenizer"
    if why:
        first = f"lorafit merge {shlex.quote(place)} -o DIR, then lorafit export DIR" if adapted else ""
        can = adapted and source.name != "demo" and not why_not_merged_gguf(found.family, found.task)
        raise RequestError(f"llama.cpp cannot take `{place}`: {why}", first if can else "")
    arguments += ["--outtype", outtype] if outtype else []
    name = (
        Path(place).expanduser().resolve().name
        if Path(place).expanduser().exists()
        else place.rpartition("/")[2]
    )
    target = Path(output).expanduser() if output else Path(f"{name}.gguf")
    _check_target(target, overwrite)
    program = _program(ADAPTERS if adapted else MODELS, llama_cpp)
    return Conversion(place, target, program, tuple(arguments), adapted, hub)


def adapted_of(folder: str, found: ModelMap) -> Adapted:
    """What an adapter's folder says it adapts. A module that has no place in the model's map counts as one that is
    more than a plain layer."""
    check_converted(folder)
    config = read_config(folder)
    named = {each.name: config[each.name] for each in fields(Lora) if config.get(each.name) is not None}
    slots = {slot.path: slot for slot in (*found.slots, *found.unplaced)}
    modules = modules_of(folder)
    placed = tuple(slots[name] for name in modules if name in slots)
    lora = Lora(**{**named, "alpha": config["lora_alpha"]})
    return Adapted(lora, placed, len(modules))


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise RequestError(f"-o `{target}` is a folder", f"name a file in it, as {target / 'model.gguf'}")
    if not target.exists():
        return
    if not overwrite:
        raise RequestError(f"`{target}` exists", "choose another -o, or --overwrite to replace it")
    with target.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise RequestError(f"`{target}` is not a GGUF file: it is not replaced", "choose another -o")


def _program(name: str, folder: str | None) -> Path | None:
    """llama.cpp's program: in the folder that is named, or on PATH. Raises RequestError where a folder that was named
    does not hold it."""
    asked = folder or os.environ.get(PLACE)
    if asked:
        path = Path(asked).expanduser() / name
        if not path.is_file():
            what = "--llama-cpp" if folder else PLACE
            raise RequestError(f"there is no {name} in {what} `{asked}`", f"{CLONE} gets it")
        return path.resolve()
    places = (Path(part) / name for part in os.environ.get("PATH", "").split(os.pathsep) if part)
    return next((path for path in places if path.is_file()), None)


def export(conversion: Conversion) -> ExportReport:
    """Run the converter, read its file back and put it in its place.

    Raises RequestError where llama.cpp is not on this machine, RunError where the converter fails or its file is not
    what was exported.
    """
    program = conversion.program
    if program is None:
        name = ADAPTERS if conversion.adapted else MODELS
        again = f"lorafit export {shlex.quote(conversion.place)} --to gguf --llama-cpp llama.cpp"
        raise RequestError(f"llama.cpp's {name} is not on this machine", f"{CLONE}, then {again}")
    if conversion.hub is not None:  # the converter reads a folder
        folder = str(base_folder(conversion.hub))
        conversion = replace(conversion, arguments=(folder, *conversion.arguments[1:]))
    target = conversion.target
    beside = target.with_name(f".{target.stem}.{os.getpid()}.gguf")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _run(conversion.command(beside), program)
        kind, alpha, names = _read_back(beside, program)
        _judge(conversion, kind, alpha, names)
        size = beside.stat().st_size
        beside.replace(target)
    except OSError as error:
        raise RunError(f"`{target}` cannot be written: {error.strerror}", "choose another -o") from None
    finally:
        beside.unlink(missing_ok=True)
    return ExportReport(conversion.place, str(target), bool(conversion.adapted), len(names), size, alpha)


def _run(command: Sequence[str], program: Path) -> str:
    """What a program prints. Raises RunError with its last line where it fails."""
    own = program.parent / "gguf-py"
    path = os.pathsep.join(filter(None, [str(own) if own.is_dir() else "", os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        list(command), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        missing = lines and lines[-1].startswith("ModuleNotFoundError")
        raise RunError(
            f"{program.name} failed: {lines[-1] if lines else f'exit code {done.returncode}'}",
            "pip install gguf" if missing else f"to see all it says: {shlex.join(command)}",
        )
    return done.stdout


def _read_back(file: Path, program: Path) -> tuple[str | None, float | None, list[str]]:
    """(type, alpha, names of tensors) of a GGUF file."""
    if not file.is_file():
        raise RunError(f"{program.name} wrote no file")
    kind, alpha, names = json.loads(_run([sys.executable, "-c", READ_BACK, str(file)], program))
    return kind, alpha, names


def _judge(conversion: Conversion, kind: str | None, alpha: float | None, names: Sequence[str]) -> None:
    """Raises RunError where the file does not hold what was exported: of an adapter two matrices a module, and its
    alpha."""
    adapted = conversion.adapted
    wrong = ""
    if adapted is None:
        wrong = "" if names else "no tensors"
    elif kind != "adapter":
        wrong = f"a file of type `{kind}`"
    elif len(names) != 2 * adapted.modules:
        wrong = f"{len(names)} tensors for {adapted.modules} modules"
    elif alpha is None or abs(alpha - adapted.lora.alpha) > 1e-6 * adapted.lora.alpha:
        wrong = f"alpha {alpha} for {adapted.lora.alpha:g}"
    if wrong:
        raise RunError(
            f"the converter made {wrong} of `{conversion.place}`",
            "a newer llama.cpp, or merge it first: lorafit merge",
        )
