"""The house is one flat street: a file imports only from files above it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOUSE = ROOT / "lorafit"
# From the top down; README.md shows the same list.
STREET = [
    "errors",
    "units",
    "heap",
    "bands",
    "roles",
    "options",
    "spelling",
    "packing",
    "modelmap",
    "presets",
    "config",
    "plan",
    "cost",
    "events",
    "seals",
    "outputs",
    "runs",
    "cards",
    "page",
    "demo",
    "tensorfiles",
    "survey",
    "examples",
    "caches",
    "rows",
    "data",
    "batch",
    "lowrank",
    "adapter",
    "prefix",
    "schedule",
    "checkpoint",
    "tracker",
    "step",
    "simulate",
    "probe",
    "forecast",
    "evaluate",
    "samples",
    "benchmarks",
    "compare",
    "train",
    "proof",
    "merge",
    "hub",
    "show",
    "cli",
    "__main__",
]
TORCH_LINE = STREET.index("demo")
HEAVY = {"torch", "transformers", "peft", "datasets", "safetensors", "accelerate"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, in function bodies too, but not for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """The rooms of the house among imported names."""
    found = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "lorafit" and len(parts) > 1 and parts[1] in STREET:
            found.add(parts[1])
    return found


def test_every_file_has_its_place_on_the_street():
    files = {p.stem for p in HOUSE.glob("*.py")} - {"__init__"}
    folders = {p.name for p in HOUSE.iterdir() if p.is_dir() and (p / "__init__.py").is_file()}
    assert files | folders == set(STREET)


def test_no_file_imports_upward():
    for number, name in enumerate(STREET):
        path = HOUSE / f"{name}.py" if (HOUSE / f"{name}.py").is_file() else HOUSE / name / "__init__.py"
        wrong = {other for other in own(imports(path)) if STREET.index(other) >= number}
        assert not wrong, f"{path.name} imports {wrong}"


def test_nothing_above_the_torch_line_imports_what_is_heavy():
    for name in STREET[:TORCH_LINE]:
        heavy = {module.split(".")[0] for module in imports(HOUSE / f"{name}.py")} & (HEAVY | {"rich"})
        assert not heavy, f"{name}.py imports {heavy}"


def test_only_show_imports_rich():
    users = {p.stem for p in HOUSE.rglob("*.py") if any(m.split(".")[0] == "rich" for m in imports(p))}
    assert users == {"show"}


def test_the_readme_shows_the_same_street():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## The house", 1)[1]
    shown = re.findall(r"^\s*(\w+)(?:\.py|/) ", tree, re.MULTILINE)
    assert [name for name in shown if name in STREET] == STREET
