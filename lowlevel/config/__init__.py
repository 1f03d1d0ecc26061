"""The configuration of a run: keys (schema.py), run files and flags (file.py), contradictions between keys."""

METHODS = {  # each is a command and a section of a run file of its name; here, because pydantic takes long to import
    "sft": "supervised fine-tuning",
    "dpo": "Direct Preference Optimization",
    "kto": "Kahneman-Tversky Optimization: completions with a label instead of pairs",
    "reward": "reward model: a scalar head, trained on preference pairs",
    "grpo": "GRPO and its family: completions are sampled, rewarded and compared with their group",
    "rloo": "RLOO: completions are sampled, and each is compared with the others of its prompt",
    "ppo": "PPO: completions are sampled, and a value head predicts the reward still to come at each token",
    "online_dpo": "DPO on the best and the worst of sampled completions",
}
