"""The runs' models by plain transformers and PEFT, and what they say about the held-out rows."""

import json
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from workspace import CHATS, HELD_OUT, PAIRS

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)


def plain_base(folder: Path, *, quantised: bool = True):
    settings = {"quantization_config": NF4} if quantised else {}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **settings)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # where the CPU has AVX512-BF16, eval mode would compute in bf16
    return model.eval()


def plain_stack(base, parent: Path | None, adapter: Path):
    """Both adapters active at once, as PEFT adds them."""
    if parent is None:
        return PeftModel.from_pretrained(base, adapter).eval()
    model = PeftModel.from_pretrained(base, parent, adapter_name="parent")
    model.load_adapter(adapter, adapter_name="dpo")
    model.base_model.set_adapter(["parent", "dpo"])
    return model.eval()


@torch.no_grad()
def completion_logp(model, tokenizer, prompt: str, completion: str) -> tuple[float, int]:
    """log pi(completion </s> | prompt) and its number of tokens, by a plain forward of one row."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    head = tokenizer(text, add_special_tokens=False).input_ids
    tail = tokenizer(completion + "</s>", add_special_tokens=False).input_ids
    logits = model(input_ids=torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].double()
    return float(logits.log_softmax(-1).gather(1, torch.tensor(tail)[:, None]).sum()), len(tail)


def held_out_logps(model, tokenizer) -> dict[str, torch.Tensor]:
    """Over the held-out pairs: log-probabilities of both completions, and the chosen ones' lengths."""
    rows = PAIRS[-HELD_OUT:]
    chosen = [completion_logp(model, tokenizer, row["prompt"], row["chosen"]) for row in rows]
    rejected = [completion_logp(model, tokenizer, row["prompt"], row["rejected"]) for row in rows]
    return {
        "chosen": torch.tensor([logp for logp, _ in chosen]),
        "rejected": torch.tensor([logp for logp, _ in rejected]),
        "lengths": torch.tensor([length for _, length in chosen]),
    }


def held_out_chat_loss(model, tokenizer) -> float:
    rows = [[m["content"] for m in row["messages"]] for row in CHATS[-HELD_OUT:]]
    scored = [completion_logp(model, tokenizer, *row) for row in rows]
    return -sum(logp for logp, _ in scored) / sum(length for _, length in scored)


def share(margins: torch.Tensor) -> float:
    return float((margins > 0).double().mean())


def adapter_updates(*folders: Path) -> dict[str, torch.Tensor]:
    """scaling * B A summed over adapters, by module name."""
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        weights = load_file(folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text())
        for key in weights:
            if ".lora_A." in key:
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                b = weights[key.replace("lora_A", "lora_B")].double()
                update = config["lora_alpha"] / config["r"] * (b @ weights[key].double())
                total[module] = total.get(module, 0) + update
    return total


def dequantized(model) -> dict[str, torch.Tensor]:
    return {
        name: bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).double()
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def peft_merge(base: Path, *adapters: Path) -> dict[str, torch.Tensor]:
    """PEFT's own merge in fp32, one adapter after the other, into the weights as they are stored."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.state_dict()


@torch.no_grad()
def divergence(first, second) -> float:
    """KL in nats a token, over the held-out conversations of these tests as plain text."""
    total, count = 0.0, 0
    for row in CHATS[-HELD_OUT:]:
        ids = torch.tensor([[3 + ord(c) % 200 for m in row["messages"] for c in m["content"]]])
        p, q = (model(input_ids=ids).logits.double().log_softmax(-1) for model in (first, second))
        total, count = total + float((p.exp() * (p - q)).sum()), count + ids.numel()
    return total / count
