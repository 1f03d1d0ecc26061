"""Run files of the TinyLlama shape, for tests of memory that load no weights."""

import json

from lowlevel.config.data import DataConfig
from lowlevel.config.schema import LoraConfig, RunConfig, TrainConfig
from lowlevel.model.memory import AdapterSize

RECIPE = AdapterSize(64, LoraConfig().target_modules)


def run_config(method="sft", **train):
    data = DataConfig(format="messages" if method == "sft" else "preference")
    return RunConfig(method=method, data=data, train=TrainConfig(**train))


def write_config(folder, **changes):
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
                "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
                "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    return str(folder)
