"""A run of many hours in miniature: twenty thousand steps, and nothing grows."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lorafit import demo, digests
from lorafit.model.load import load_tokenizer

STEPS = 20_000
RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from jobs import job_for
from lorafit.train.loggers import recorded
from lorafit.train.loop import run
from lorafit.train.measure import _status
from lorafit.events import Stepped

model, data, output, steps = sys.argv[2:]
job = job_for(
    model, Path(output), data=(data,), preset="all", layers="1", max_steps=int(steps), batch_size=4, max_length=16,
    save_steps=1000, eval_steps=1000, keep=2, learning_rate=1e-4,
)
held = []
for event in recorded(job, run(job)):
    if isinstance(event, Stepped) and event.step % 100 == 0:
        held.append((event.step, _status("VmRSS")))
print(json.dumps(held))
"""


@pytest.mark.long
def test_memory_stays_flat_over_twenty_thousand_steps(tmp_path):
    config = LlamaConfig(
        vocab_size=896, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    load_tokenizer(str(demo.MODEL), "demo").save_pretrained(tmp_path / "model")
    lines = ("".join(json.dumps({"text": f"Ada has {n} lamps."}) + "\n" for n in range(2000)),)
    (tmp_path / "data.jsonl").write_text(*lines)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(Path(__file__).parent), str(tmp_path / "model"),
         str(tmp_path / "data.jsonl"), str(tmp_path / "r"), str(STEPS)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = json.loads(done.stdout.splitlines()[-1])
    level = mean(size for step, size in held if 1000 < step <= 2000)
    last = mean(size for step, size in held if step > 0.75 * STEPS)
    print(f"after 1,000 steps {level / 1e6:.1f} MB, in the last quarter {last / 1e6:.1f} MB")
    assert level > 0 and last <= 1.02 * level, (level, last)
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, STEPS + 1))
    kept = sorted((tmp_path / "r").glob("checkpoint-*"))
    assert 2 <= len(kept) <= 3  # the last two, and the best where it is another
    for folder in (*kept, tmp_path / "r"):
        digests.check(folder)
