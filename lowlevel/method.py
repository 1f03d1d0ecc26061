"""A training method: how examples become micro-batches, what they are counted by, and their summed loss."""

from __future__ import annotations

from lowlevel.dpo import DPO
from lowlevel.sft import SFT

Method = SFT | DPO
