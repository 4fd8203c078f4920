"""What is shipped: a wheel that holds the presets and the demo, and a command that finds them."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without isolation, so offline, from a copy: a build leaves files beside its sources."""
    import shutil

    source = tmp_path_factory.mktemp("source") / "lorafit"
    ignored = shutil.ignore_patterns(
        ".git", "*.egg-info", "build", "__pycache__", "runs", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_presets_and_demo_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("_presets/ffn.yaml", "demo/train.jsonl", "demo/held-out.jsonl", "demo/model/model.safetensors",
                 "demo/model/tokenizer.json", "demo/model/chat_template.jinja", "demo/README.md", "py.typed",
                 "docs/data.md", "docs/options.md"):  # fmt: skip
        assert f"lorafit/{name}" in names
    assert not [n for n in names if n.startswith(("tests", "presets"))]
    demo = sum(i.file_size for i in zipfile.ZipFile(wheel).infolist() if "/demo/" in i.filename)
    assert demo < 6_000_000


def test_a_wheel_finds_its_presets_and_its_demo(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    code = (
        "import lorafit, lorafit.cli; assert lorafit.__file__.startswith(sys_path), lorafit.__file__\n"
        "from lorafit import demo, settings; assert len(settings.preset_names()) == 5\nassert settings.load_preset('ffn').roles\n"
        "assert demo.MODEL.is_dir() and str(demo.MODEL).startswith(sys_path)\n"
        "lorafit.cli.app(['plan', '--preset', 'ffn', '--layers', 'high', '--no-estimate'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"sys_path = {str(tmp_path / 'site')!r}\n{code}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "69,120" in done.stdout, done.stderr


def test_the_version_stands_in_one_place(wheel):
    from lorafit import __version__

    assert f"lorafit-{__version__}-" in wheel.name
    assert __version__ not in (ROOT / "pyproject.toml").read_text()


@pytest.mark.long
def test_the_demo_is_made_by_its_program(tmp_path):
    """A few steps of it: the same tokenizer and the same rows as those that are shipped."""
    from lorafit import demo

    subprocess.run(
        [sys.executable, "-m", "lorafit.demo.build", "--first", "2", "--second", "2", "-o", tmp_path],
        check=True,
        capture_output=True,
    )
    for name in ("train.jsonl", "held-out.jsonl", "model/tokenizer.json", "model/config.json"):
        assert (tmp_path / name).read_bytes() == (demo.FOLDER / name).read_bytes(), name
