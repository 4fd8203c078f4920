"""The order of the folders: each imports only from rows above it, through the doors, and the light ones no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "lorafit"
# From the top down; a row imports only from rows above it. Folders and files of one row know nothing of each other.
ROWS = [
    ["errors", "units", "jsonio", "system", "lazy"],
    ["cache", "distributed"],
    ["digests", "events", "results", "demo"],
    ["outputs", "model"],
    ["settings"],
    ["data", "adapter"],
    ["forward", "report"],
    ["estimate"],
    ["evaluate"],
    ["train", "merge"],
    ["compare"],
    ["operations", "hub", "screen"],
    ["api", "cli"],
    ["__main__"],
]
ORDER = {name: number for number, row in enumerate(ROWS) for name in row}
# What is imported without torch, transformers, peft or rich: what `--help`, refusals and cached answers need.
LIGHT = [
    *(name for row in ROWS[:4] for name in row if name not in ("model", "demo")),
    "lorafit", "demo", "hub", "model.roles", "model.map", "model.source", "model.chart", "model.classes", "model.load", "model.quantised",
    "settings.bands", "settings.options", "settings.run_config", "settings.preset", "settings.precedence",
    "adapter.plan", "adapter.peft_names", "adapter.folder", "adapter.base", "data.files", "data.formats", "data.batching",
    "forward.placement", "report.run", "report.html", "report.svg", "report.markup", "report.model_card", "report.listing",
    "estimate.terms", "estimate.formulas", "estimate.changes", "estimate.cost", "estimate.device", "estimate.forecast", "estimate.glibc_heap",
    "api", "operations.options", "operations.planning", "operations.training", "operations.evaluating",
    "operations.merging", "operations.comparing", "cli", "cli.plan", "cli.train", "cli.compare", "cli.runs",
    "compare.grid", "compare.candidates", "compare.request", "compare.ahead", "compare.ranking",
]  # fmt: skip
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "rich"}
LONGEST_FILE, LONGEST_FUNCTION = 450, 66  # of about 60: a line less is no reason to cut a thought in two


def files() -> list[Path]:
    return sorted(p for p in HOUSE.rglob("*.py") if "demo" not in p.relative_to(HOUSE).parts)


def home(path: Path) -> str:
    """The folder, or the file, of the house that a file belongs to."""
    first = path.relative_to(HOUSE).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> set[tuple[str, str]]:
    """(module, name) of all that a file imports from lorafit, in function bodies too; not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom):
            continue
        assert node.level == 0, f"{path}: relative import"
        if (node.module or "").split(".")[0] == "lorafit":
            found |= {(str(node.module), alias.name) for alias in node.names}
    return found


def test_every_folder_and_file_has_its_place():
    there = {p.stem for p in HOUSE.glob("*.py")} - {"__init__"}
    there |= {p.name for p in HOUSE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert there == set(ORDER)


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(HOUSE)))
def test_no_file_imports_from_below_or_past_a_door(path):
    own = home(path)
    for module, name in imports(path):
        parts = module.split(".")[1:] or [name]
        if parts[0] not in ORDER or parts[0] == own:
            continue
        assert ORDER[parts[0]] < ORDER.get(own, 99), f"imports {module}"
        if (HOUSE / parts[0]).is_dir() and parts[0] != "demo":
            assert len(parts) == 1, f"imports {module} past its door"


def test_files_of_a_folder_import_one_another_without_circles():
    for folder in (p for p in HOUSE.iterdir() if (p / "__init__.py").is_file() and p.name != "demo"):
        needs = {
            path.stem: {m.split(".")[2] for m, _ in imports(path) if m.startswith(f"lorafit.{folder.name}.")}
            for path in folder.glob("*.py")
            if path.stem != "__init__"
        }
        if folder.name == "cli":  # `app` carries the commands, which register themselves
            needs = {name: them - {"app"} for name, them in needs.items()}
        while needs:
            free = [name for name, them in needs.items() if not them & set(needs)]
            assert free, f"a circle in {folder.name}: {needs}"
            needs = {name: them for name, them in needs.items() if name not in free}


def test_what_is_light_imports_nothing_heavy():
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += f"heavy = {HEAVY!r} & set(sys.modules)\nassert not heavy, heavy\n"
    names = [name if name == "lorafit" else f"lorafit.{name}" for name in LIGHT if name != "__main__"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_screen_imports_rich():
    for path in files():
        if home(path) != "screen":
            assert "rich" not in {
                alias.name.split(".")[0] if isinstance(node, ast.Import) else str(node.module).split(".")[0]
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            }, path


@pytest.mark.parametrize("folder", sorted(n for n in ORDER if (HOUSE / n / "__init__.py").is_file()))
def test_a_door_says_the_same_to_python_and_to_type_checkers(folder):
    tree = ast.parse((HOUSE / folder / "__init__.py").read_text(encoding="utf-8"))
    tables = [
        node.args[1] for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "door"
    ]  # fmt: skip
    typed = {
        (str(node.module).rpartition(".")[2], alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"lorafit.{folder}.")
        for alias in node.names
    }
    if tables:
        table = ast.literal_eval(tables[0])
        assert {(file, name) for file, names in table.items() for name in names.split()} == typed


def test_no_file_and_no_function_is_long():
    for path in files():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= LONGEST_FILE, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"
