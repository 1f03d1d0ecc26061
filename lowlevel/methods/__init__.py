"""The training methods, one file each: how examples become micro-batches, their count, and their summed loss."""

from lowlevel.methods.dpo import DPO
from lowlevel.methods.grpo import GRPO
from lowlevel.methods.kto import KTO
from lowlevel.methods.ppo import PPO
from lowlevel.methods.reward import Reward
from lowlevel.methods.rloo import RLOO
from lowlevel.methods.sft import SFT

PolicyGradient = GRPO | RLOO | PPO
Method = SFT | DPO | KTO | Reward | PolicyGradient
