"""Other systems and Pythons: nothing needs what Windows does not have, in a real run under Windows' rules for files."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "lorafit").rglob("*.py"))
MODULES = [
    ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for p in FILES
    if "demo" not in p.parts and p.name != "__main__.py"
]

# Modules and names of `os` that only POSIX has (docs.python.org/3/library/os.html, "Availability: Unix").
MISSING = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses")
POSIX = ["preadv", "pwritev", "pread", "pwrite", "readv", "writev", "posix_fadvise", "posix_fallocate", "copy_file_range", "sendfile", "splice", "memfd_create", "eventfd", "fork", "forkpty", "posix_spawn", "posix_spawnp", "wait", "wait3", "wait4", "waitid", "getuid", "geteuid", "getgid", "getegid", "getgroups", "getresuid", "setuid", "setsid", "getsid", "getpgid", "getpgrp", "setpgid", "killpg", "nice", "getpriority", "sched_getaffinity", "sched_setaffinity", "sched_yield", "sysconf", "confstr", "pathconf", "statvfs", "fstatvfs", "uname", "getloadavg", "chown", "fchown", "lchown", "fchmod", "fchdir", "chroot", "mkfifo", "mknod", "sync", "fdatasync", "lockf", "openpty", "ttyname", "ctermid", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_DIRECT", "O_SYNC", "O_DSYNC", "WNOHANG", "WIFEXITED", "WEXITSTATUS"]  # fmt: skip

PRELUDE = f"""
import errno, fcntl, importlib, multiprocessing, os, shutil, signal, sys, types, warnings
import datasets, filelock, peft, psutil, rich.progress, huggingface_hub, safetensors.torch, torch, transformers, typer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # libraries ask for their own system

for name in {MISSING!r}:
    sys.modules[name] = None
warnings.filterwarnings("error", category=EncodingWarning, module="lorafit")  # Windows' default is not UTF-8
for name in {MODULES!r}:
    importlib.import_module(name)

def refused(*arguments):
    raise AssertionError("os.kill ends a process on Windows, whatever the signal")

windows = types.SimpleNamespace(**{{name: value for name, value in vars(os).items() if name not in {POSIX!r}}})
windows.kill = refused
for name, module in list(sys.modules.items()):
    if name.startswith("lorafit") and getattr(module, "os", None) is os:
        module.os = windows
"""

# Windows renames and removes no file that is open or mapped, nor a folder with one in it; opens no folder; renames onto
# nothing; writes out (fsync) only what is open to write; and does not fork.
RULES = """
def in_use(path):
    real = os.path.realpath(path)
    held = [line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps", encoding="utf-8")]
    for number in os.listdir("/proc/self/fd"):
        try:
            held.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    for file in held:
        if file == real or file.startswith(real + os.sep):
            raise PermissionError(errno.EACCES, f"in use: {file}", str(path))

def ruled(name, check):
    real = getattr(os, name)
    def call(path, *rest, **more):
        check(path, *rest)
        return real(path, *rest, **more)
    setattr(os, name, call)
    if hasattr(windows, name):
        setattr(windows, name, call)

def onto_nothing(path, target):
    in_use(path)
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "is there", str(target))

def both(path, target):
    in_use(path), in_use(target)

def no_folder(path, *rest):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "is a folder", str(path))

def written(descriptor):
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "not open to write")

shutil._use_fd_functions = False
for name in ("unlink", "remove", "rmdir"):
    ruled(name, lambda path, *rest: in_use(path))
ruled("rename", onto_nothing)
ruled("replace", both)
ruled("open", no_folder)
ruled("fsync", written)
multiprocessing.get_all_start_methods = lambda: ["spawn"]
"""

RUN = """
from lorafit import demo
from lorafit.cli import app
from lorafit.errors import RequestError
from lorafit.train.run_folder import RunFolder
from pathlib import Path

def lorafit(text, code=0):
    try:
        app(text.split())
        ended = 0
    except SystemExit as end:
        ended = end.code or 0
    assert ended == code, (text, ended)

rows = Path(demo.TRAIN).read_text(encoding="utf-8").splitlines(keepends=True)[:40]
Path("rows.jsonl").write_text("".join(rows), encoding="utf-8")
train = "train demo --data rows.jsonl --holdout 0.2 --preset ffn --layers high --prefix-cache disk --batch-size 8 --epochs 2"
train += " --save-steps 2 --keep 1 --json -o"
prune, first = RunFolder.prune, []
def stopped(self, *given):
    prune(self, *given)
    if not first:
        first.append(1)
        signal.raise_signal(signal.SIGTERM)
RunFolder.prune = stopped
lorafit(f"{train} r", 143)
(states,) = Path(os.environ["XDG_CACHE_HOME"], "lorafit", "prefix").iterdir()
assert ".filling" not in states.name, "it has its name"
lorafit("train --resume r --json")
assert [p.name for p in Path("r").glob("checkpoint-*")] == ["checkpoint-6"]
lorafit(f"{train} r --overwrite")
lorafit("eval r --samples 1 --json")
lorafit("merge r -o m --json")
lorafit("merge r -o m --overwrite --json")
lorafit("eval m --data rows.jsonl --json")
lorafit("compare --presets basic,ffn --layers high --max-steps 2 --json -o c")
lorafit("compare --presets basic,ffn --layers high --max-steps 2 --workers 2 -o w", 2)
folder = RunFolder(Path("taken"))
folder.open(overwrite=False, resume=False)
try:
    RunFolder(Path("taken")).open(overwrite=False, resume=False)
except RequestError as error:
    assert "another run is writing" in error.message
else:
    raise AssertionError("two runs had one folder")
folder.abandon()
left = sorted(p.name for p in Path(".").iterdir())
assert left == ["c", "m", "r", "rows.jsonl"], left
assert [p.name for p in states.parent.iterdir()] == [states.name]
"""


# skipped elsewhere: the open and mapped files of a process are listed in Linux's /proc alone; the code is the same
@pytest.mark.skipif(sys.platform != "linux", reason="what is in use is read from /proc")
@pytest.mark.long
def test_a_run_needs_nothing_that_windows_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", PRELUDE + RULES + RUN],
        cwd=tmp_path / "here",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_code_is_python_3_10():
    for path in [*FILES, *sorted((ROOT / "tests").rglob("*.py"))]:
        ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 10))
