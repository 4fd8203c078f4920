"""The embedded demo: where its model and its data lie. See README.md in this folder."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "model"
TRAIN = FOLDER / "train.jsonl"
HELD_OUT = FOLDER / "held-out.jsonl"
