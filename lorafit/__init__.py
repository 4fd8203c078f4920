"""lorafit: LoRA in chosen modules of chosen layers."""

__version__ = "0.1.0"
