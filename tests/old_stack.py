"""What lorafit saves loads in an older stack: `python tests/old_stack.py FOLDER`, where
`pip install --no-deps --target FOLDER` put transformers 4.57, peft 0.17, and the tokenizers and huggingface_hub of
their time.

A run's folder and a merged one are made here, of a base whose tokenizer files transformers 4 can read, and
loaded there: they must tokenize the same, render the same template, and generate the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"

TEXTS = ["Once upon a time there was a small village.", "12 times 7 is 84", "Grüße, 你好"]

# Run in either environment: everything a server would do with the two folders, as one JSON line.
LOADED = r"""
import json, os, sys, warnings
warnings.simplefilter("ignore")
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import peft, torch, transformers
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, run, merged, texts = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
found = {"versions": {"transformers": transformers.__version__, "peft": peft.__version__}}
adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32), run).eval()
whole = AutoModelForCausalLM.from_pretrained(merged, torch_dtype=torch.float32).eval()
for name, place, model in (("run", run, adapted), ("merged", merged, whole)):
    tokenizer = AutoTokenizer.from_pretrained(place)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    with torch.no_grad():
        out = [model.generate(input_ids=torch.tensor([i]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist() for i in ids]
    found[name] = {"ids": ids, "chat": chat, "generated": out, "eos": tokenizer.eos_token}
print(json.dumps(found))
"""


def make(folder: Path) -> tuple[Path, Path, Path]:
    """(a base whose tokenizer is as transformers 4 wrote it, a run's folder, a merged one)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lorafit import demo

    base, run, merged = folder / "base", folder / "run", folder / "merged"
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(demo.MODEL / "tokenizer.json"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    (base / "tokenizer.json").write_bytes((demo.MODEL / "tokenizer.json").read_bytes())
    tokens = json.loads((demo.MODEL / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in tokens.items() if k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (base / "tokenizer_config.json").write_text(
        json.dumps({**kept, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256})
    )
    (folder / "template.jinja").write_text(TEMPLATE)
    data = folder / "data.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {n}?"},
                {"role": "assistant", "content": f"{n} it is"},
            ]
        }
        for n in range(40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for command in (
        ["train", base, "--data", data, "--chat-template", folder / "template.jinja", "--preset", "all", "--layers",
         "high", "--epochs", "2", "--learning-rate", "0.02", "-o", run],
        ["merge", run, "-o", merged],
    ):  # fmt: skip
        subprocess.run([sys.executable, "-m", "lorafit", *map(str, command), "-q"], check=True)
    return base, run, merged


def loaded(packages: str, folders: tuple[Path, Path, Path]) -> dict:
    """What the libraries in `packages`, before those installed here, make of the folders."""
    environment = {**os.environ, "PYTHONPATH": packages, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, folders), json.dumps(TEXTS)],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{packages or 'this environment'} does not load them:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(old: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folders = make(Path(name))
        base, run, _ = folders
        same = (run / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        now, then = loaded("", folders), loaded(old, folders)
        modes = {oct(p.stat().st_mode & 0o777) for f in folders[1:] for p in f.iterdir() if p.is_file()}
    versions = now.pop("versions"), then.pop("versions")
    faults = [
        f"{key} of the {part} differs"
        for part in now
        for key in now[part]
        if now[part][key] != then[part][key]
    ]
    faults += [
        f"{key} is the same: {versions[1]}" for key in versions[0] if versions[0][key] == versions[1][key]
    ]
    faults += [] if same else ["the run's tokenizer.json is not the base's"]
    faults += [] if len(modes) == 1 else [f"permissions differ: {sorted(modes)}"]
    faults += (
        []
        if now["run"]["generated"] == now["merged"]["generated"]
        else ["run and merged generate other tokens"]
    )
    for fault in faults:
        print(f"FAIL {fault}")
    print(f"{versions[1]} beside {versions[0]}")
    sys.exit(1 if faults else print("ok: loaded, tokenized and generated the same") or 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/old_stack.py FOLDER")
    main(sys.argv[1])
