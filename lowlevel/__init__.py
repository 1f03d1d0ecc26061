"""lowlevel: QLoRA SFT and DPO on one small GPU, from hand-written loops whose every number can be checked."""

__version__ = "0.1.0"
