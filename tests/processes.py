"""Commands in several processes of this machine, and what they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorafit.adapter.folder import WEIGHTS
from lorafit.estimate import glibc_heap

TESTS = Path(__file__).parent
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
NO_NOISE = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "t5": {"dropout_rate": 0.0},
}


def environment(**more):
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "COLUMNS": "80",
        **more,
    }


def launched(*arguments, **more):
    """A command in two processes."""
    return subprocess.run(
        [*LAUNCH, *map(str, arguments)], capture_output=True, text=True, env=environment(**more), timeout=900
    )


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def same_adapter(one, other):
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], atol=1e-5, rtol=0, msg=key)


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith(("error:", "hint:"))]


# Reads a command a line, and forks children that run it from `main` on and end as any process does.
SERVER = """
import json, os, sys
import datasets, peft, safetensors.torch, torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, get_scheduler
import lorafit.compare, lorafit.evaluate, lorafit.merge, lorafit.report, lorafit.train
from lorafit import digests
from lorafit.__main__ import main
from lorafit.cli import app

def serve():
    while line := sys.stdin.readline():
        asked, pids = json.loads(line), []
        for rank in range(asked["processes"]):
            pid = os.fork()
            if not pid:
                return asked, rank
            pids.append(pid)
        print(pids[0], flush=True)
        print(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]), flush=True)

asked, rank = serve() or (None, 0)
if asked is not None:
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    if asked["processes"] > 1:
        size = str(asked["processes"])
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
    for number, path in enumerate(asked["streams"]):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["lorafit", *asked["words"]]
    exec(asked["first"], globals() if asked["commanded"] else {"__name__": "__main__"})
    if asked["commanded"]:
        main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
"""


class Forked:
    """`lorafit …` in children of one process that has everything imported: the start, without its seconds."""

    def __init__(self, room: Path, environment: Mapping[str, str] | None = None) -> None:
        self.streams = [room / name for name in ("stdin", "stdout", "stderr")]
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**(environment or os.environ), **tcache_off()},
        )  # fmt: skip

    def run(
        self, *words: object, cwd: Path | str = ".", env: Mapping[str, str] | None = None, said: str = "",
        together: bool = False, first: str = "", kill_after: float | None = None, processes: int = 1,
        commanded: bool = True,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """What a command left: stdout and stderr apart or `together`. `said` is its stdin, `first` is Python that it
        runs before, and after `kill_after` seconds it is killed. Several `processes` are those of one run, as a launcher
        names them; the code is the first's that is not 0."""
        texts = (said, "", "")
        for path, text in zip(self.streams, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        streams = [*self.streams[:2], self.streams[1 if together else 2]]
        own = {**(os.environ if env is None else env), **tcache_off()}
        if processes > 1:
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        asked = {
            "words": list(map(str, words)), "cwd": str(Path(cwd).absolute()), "first": first, "environment": own,
            "streams": list(map(str, streams)), "processes": processes, "commanded": commanded,
        }  # fmt: skip
        self.server.stdin.write(json.dumps(asked) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(status) for status in json.loads(self.server.stdout.readline())]
        _, out, err = (path.read_text(encoding="utf-8") for path in self.streams)
        assert "Traceback" not in out + err, out + err
        return subprocess.CompletedProcess(asked["words"], next(filter(None, codes), 0), out, err)

    def python(self, code: str, cwd: Path | str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """What a piece of Python left, run as `python -c` runs it."""
        return self.run(cwd=cwd, env=env, first=code, commanded=False)

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


def tcache_off() -> dict[str, str]:
    """What a command starts itself again with, where this system has it: a child that forks cannot."""
    found = glibc_heap.environment()
    return {glibc_heap.TUNABLES: found[glibc_heap.TUNABLES]} if glibc_heap.TUNABLES in found else {}
