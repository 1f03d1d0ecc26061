"""The training methods, a file each: how examples become micro-batches, what they are counted by, their summed loss."""

from lowlevel.methods.dpo import DPO
from lowlevel.methods.sft import SFT

Method = SFT | DPO
