"""What other tools call our options: TRL, the transformers Trainer, PEFT, Axolotl, LLaMA-Factory, Unsloth, mlx-lm."""

from __future__ import annotations

from collections.abc import Collection

MODEL = "MODEL, the first argument"
LORA = "a preset's `lora`: lorafit help presets"
BEST = "the best adapter is saved where --eval-steps is given; --keep-last saves the last"

# Their names, with dashes and in lower case, by what lorafit has instead: its option with or without a value, or a
# sentence.
THEIRS = {
    MODEL: "model model-name model-name-or-path model-id base-model base-model-id pretrained-model-name-or-path",
    "--data": "dataset datasets dataset-name dataset-path train-file train-data train-path data-path dataset-dir "
    "train-dataset",
    "--eval-data": "eval-dataset validation-file valid-data val-data test-datasets val-dataset",
    "--holdout": "eval-split val-size val-set-size validation-split-percentage test-size dev-ratio",
    "--format": "dataset-format data-format dataset-type",
    "--map text=COLUMN": "dataset-text-field text-field text-column",
    "--chat-template": "template chat-template-jinja chat-template-path",
    "--loss-on": "completion-only-loss assistant-only-loss train-on-inputs train-on-prompt mask-prompt "
    "train-on-responses-only mask-history",
    "--max-length": "max-seq-length max-seq-len sequence-len sequence-length seq-length cutoff-len block-size "
    "model-max-length max-source-length",
    "--overflow": "truncation truncate",
    "rows of like length share a batch, with little padding: leave it out": "packing sample-packing group-by-length",
    "--epochs": "num-train-epochs num-epochs train-epochs n-epochs max-epochs epoch",
    "--max-steps": "iters num-steps max-train-steps steps num-training-steps",
    "--batch-size": "batch bs b per-device-train-batch-size train-batch-size micro-batch-size micro-batch "
    "per-gpu-train-batch-size per-device-eval-batch-size eval-batch-size",
    "--accumulate": "gradient-accumulation-steps grad-accumulation-steps grad-accum gradient-accumulation "
    "accumulation-steps accumulate-grad-batches",
    "--learning-rate": "lr max-lr",
    "--scheduler": "lr-scheduler lr-scheduler-type lr-schedule scheduler-type",
    "--warmup": "warmup-ratio warmup-steps num-warmup-steps",
    "--optimizer": "optim optim-type",
    "--weight-decay": "wd decay",
    "--max-grad-norm": "gradient-clipping gradient-clip clip-grad-norm max-norm grad-clip clip",
    "--seed": "random-seed",
    "--dtype": "torch-dtype precision mixed-precision",
    "--dtype bfloat16": "bf16 bf16-full-eval",
    "--dtype float16": "fp16 half",
    "--quantize nf4": "load-in-4bit use-4bit 4bit qlora bnb-4bit-quant-type quantization-bit",
    "--quantize int8": "load-in-8bit use-8bit 8bit",
    "--attention": "attn-implementation flash-attn flash-attention use-flash-attention-2",
    "--gradient-checkpointing": "grad-checkpoint activation-checkpointing use-gradient-checkpointing",
    "--compile": "torch-compile torch-compile-backend torch-compile-mode",
    "--rank": "r lora-r lora-rank lora-dim",
    "--alpha": "lora-alpha",
    "--dropout": "lora-dropout",
    "--modules": "target-modules lora-target lora-target-modules target",
    "--preset all": "lora-target-linear",
    "--layers": "layers-to-transform lora-layers num-layers peft-layers-to-transform",
    "--from-adapter": "adapter adapter-name-or-path lora-model-dir adapter-path resume-adapter-file peft-model-id",
    LORA: "use-dora use-rslora modules-to-save lora-modules-to-save init-lora-weights lora-bias bias",
    "lorafit always trains LoRA: leave it out": "use-peft use-lora finetuning-type peft train-type lora stage do-train",
    "--output": "output-dir out-dir out save-dir save-path output-path",
    "--overwrite": "overwrite-output-dir",
    "--resume RUN": "resume-from-checkpoint auto-resume-from-checkpoints",
    "--save-steps": "save-strategy save-every save-interval",
    "--keep": "save-total-limit",
    "--eval-steps": "eval-strategy evaluation-strategy evals-per-epoch steps-per-eval val-interval eval-interval do-eval",
    "--patience": "early-stopping-patience early-stopping",
    "--min-delta": "early-stopping-threshold",
    BEST: "load-best-model-at-end metric-for-best-model",
    "every step is in the run's events.jsonl: leave it out": "logging-steps logging-strategy log-interval steps-per-report",
    "--track": "trackers logger",
    "--track-name": "run-name wandb-name wandb-run-id wandb-run-name",
    "--track wandb": "wandb use-wandb",
    "--track-project": "wandb-project project project-name",
    "--push-to-hub OWNER/NAME": "hub-model-id hub-repo repo-id push-to-hub-model-id",
    "--device": "no-cuda use-cpu gpu device-map",
    "lorafit runs no code from a repository: leave it out": "trust-remote-code",
    "`timeout -s INT 30m lorafit train …` ends a run after that time: it is saved, and --resume goes on": "budget "
    "max-minutes max-time time-limit max-hours max-seconds timeout max-duration",
    "torchrun starts several processes: lorafit help distributed": "deepspeed fsdp num-gpus nproc-per-node local-rank",
}
LORAFITS = {theirs: ours for ours, names in THEIRS.items() for theirs in names.split()}


def ours(name: str, known: Collection[str]) -> str:
    """What lorafit calls an option that it does not have, as a hint; empty where nothing is known of it. `known`
    are the options of the command that it was given to."""
    plain = name.lstrip("-").replace("_", "-").lower()
    found = f"--{plain}" if f"--{plain}" in known else LORAFITS.get(plain, "")
    if not found.startswith("--"):
        return f"lorafit takes it as {found}" if found == MODEL else found
    if found.split()[0] in known:
        return f"lorafit calls it {found}"
    return f"`lorafit train` calls it {found}"
