"""Pre-train the demo's base model from scratch: `python -m benchmarks.demo_base.pretrain --out DIR`.

Trains a byte-level BPE tokenizer and a small Llama on `corpus.pretraining_text` and writes a Hugging Face folder.
Documents are packed one after the other, each ending with `</s>`. The tokenizer has a chat template, but no training
text uses it. The folder `lowlevel/demo/base` was made with the defaults on one H100.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.demo_base.corpus import pretraining_text

VOCABULARY = 1024
CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_CHUNK = 5000


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train the tokenizer: byte-level BPE, which can encode any text, with one token per digit.

    The chat markers are ordinary text. A LoRA adapter does not train embeddings, so a special token for a marker would
    keep its random embedding; the pieces `<|`, `user` and `|>` are known from the plain text.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int) -> LlamaForCausalLM:
    """Make the untrained model; each linear layer has a multiple of 64 inputs, the block size of 4-bit NF4."""
    if hidden % 128:
        raise ValueError(f"hidden is {hidden}; it must be a multiple of 128 (two heads of 64 share one key)")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _chunk(argument: tuple[int, int]) -> list[str]:
    return pretraining_text(*argument)


def write_corpus(seed: int, documents: int) -> list[str]:
    """Generate the documents on all cores; their number is rounded up to a multiple of 5000."""
    chunks = [(seed * 100_003 + index, _CHUNK) for index in range(math.ceil(documents / _CHUNK))]
    with multiprocessing.get_context("spawn").Pool() as pool:
        return [text for chunk in pool.map(_chunk, chunks) for text in chunk]


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Return the token ids of all documents as one row, int64; each document ends with `</s>`."""
    ids: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[start : start + _CHUNK]):
            ids.extend(encoding.ids)
            ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def batches(ids: torch.Tensor, batch: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield (batch, CONTEXT) windows at random positions, endlessly."""
    offsets = torch.arange(CONTEXT, device=ids.device)
    while True:
        starts = torch.randint(len(ids) - CONTEXT, (batch, 1), generator=generator).to(ids.device)
        yield ids[starts + offsets]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine down to 5 % of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, ids: torch.Tensor, steps: int, batch: int, peak: float, seed: int) -> None:
    """Train in place with AdamW on the device of `ids`: bf16 autocast on CUDA, fp32 on a CPU."""
    device = ids.device
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    data = batches(ids, batch, torch.Generator().manual_seed(seed))
    started = time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rows = next(data)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.4f}  {time.time() - started:.0f} s", flush=True)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=128, help="rows of 256 tokens a step")
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    texts = write_corpus(args.seed, args.documents)
    tokenizer = build_tokenizer(texts[:20_000])
    ids = pack(tokenizer, texts).to(args.device)
    model = build_model(tokenizer, args.hidden, args.layers).to(args.device)
    print(
        f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary, {len(ids):,} in the corpus"
    )
    train(model, ids, args.steps, args.batch, args.lr, args.seed)
    model.to("cpu", torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out, save_jinja_files=False)


if __name__ == "__main__":
    main()
