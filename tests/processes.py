"""Commands in several processes of this machine, and what they leave."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lorafit.adapter.folder import WEIGHTS

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


def same_adapter(one, other):
    a, b = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        torch.testing.assert_close(tensor, b[key], atol=1e-5, rtol=0, msg=key)


def lines_of(text):
    return [line for line in text.splitlines() if line.startswith(("error:", "hint:"))]
