"""Tokenizers of known model families: their published pipelines and chat templates, with vocabularies trained here."""

import json
from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast

from lowlevel.data.rendering import ChatTokenizer
from lowlevel.data.tokenizer import chat_tokenizer

CORPUS = [
    "There are three ways to say it. The user asks, the assistant answers: yes, no, or nothing at all.\n\n",
    "USER: What is it? ASSISTANT: There it is.\n    def there(x):\n        return 1234 + x\n\n\nThere you are!  ",
    "Falcon: User: Über Ærø, naïve café, 你好 世界, 😀 👩‍👩‍👧 \u0301e\u0301 <|user|> [INST] </s> ' s 'll\t\r\n",
] * 3
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
VICUNA = (  # with a space at the end of the generation prompt, which many copies have
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
INST3 = INST.replace("' ' + m['content'].strip() + ' ' + eos", "m['content'] + eos").replace("T] ' +", "T]' +")
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') "
    "+ '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
FALCON = (
    "{% for m in messages %}{{ ('User' if m['role'] == 'user' else 'Falcon') + ': ' + m['content'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Falcon:' }}{% endif %}"
)


METASPACE = normalizers.Replace(" ", "▁")
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), METASPACE])
PIECES = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def byte_level(words=None, *, normalizer=None, post=None, prefix=False, ignore_merges=False) -> Tokenizer:
    """GPT-2's kind. `words`: the steps before it, which split the text instead of GPT-2's pattern."""
    core = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if normalizer:
        core.normalizer = normalizer
    core.pre_tokenizer = pre.Sequence([*(words or []), pre.ByteLevel(add_prefix_space=prefix, use_regex=not words)])
    core.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    if post:
        core.post_processor = post
    return core


def sentencepiece(normalizer=None, pre_tokenizer=None) -> Tokenizer:
    """Llama 2's kind: "▁" for a space, bytes for unknown characters."""
    core = Tokenizer(models.BPE())
    core.normalizer = METASPACE
    trainer = trainers.BpeTrainer(vocab_size=400, max_token_length=8, limit_alphabet=70, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    trained = json.loads(core.to_str())["model"]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    merges = [tuple(pair) for pair in trained["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if normalizer:
        core.normalizer = normalizer
    if pre_tokenizer:
        core.pre_tokenizer = pre_tokenizer
    core.decoder = PIECES
    return core


def unigram() -> Tokenizer:
    """T5's kind: blanks of any length, newlines among them, are one space."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace(prepend_scheme="always")])
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    return core


def split(pattern: str) -> pre.Split:
    return pre.Split(Regex(pattern), "isolated")


def falcon() -> Tokenizer:
    digits = pre.Split(Regex("[0-9][0-9][0-9]"), "isolated")
    return byte_level([pre.Punctuation("contiguous"), pre.ByteLevel(add_prefix_space=False), pre.Digits(), digits])


KEEP, TRIM = processors.ByteLevel(trim_offsets=False), processors.ByteLevel(trim_offsets=True)
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<|user|>", "<|assistant|>", "<|end|>")
FAMILIES: dict[str, Callable[[], ChatTokenizer]] = {
    "gpt2": lambda: chat(byte_level(post=KEEP), VICUNA),
    "roberta": lambda: chat(byte_level(post=TRIM), VICUNA),
    "prefix space": lambda: chat(byte_level(post=TRIM, prefix=True), VICUNA),
    "prefix space, chatml": lambda: chat(byte_level(post=TRIM, prefix=True), CHATML, special=IM),
    "llama 2": lambda: chat(sentencepiece(PREPEND), INST, bos="<s>"),
    "zephyr": lambda: chat(sentencepiece(PREPEND), ZEPHYR, bos="<s>"),
    "mistral 0.3": lambda: chat(
        sentencepiece(None, pre.Metaspace(prepend_scheme="first", split=False)),
        INST3,
        bos="<s>",
        special=("[INST]", "[/INST]"),
    ),
    "tekken": lambda: chat(byte_level([split(LLAMA3_WORDS)]), INST3, bos="<s>", special=("[INST]", "[/INST]")),
    "phi 3": lambda: chat(sentencepiece(PREPEND), PHI3, bos="<s>", eos="<|endoftext|>", special=TURNS, rstrip=True),
    "left strip": lambda: chat(byte_level(post=TRIM), PHI3, special=TURNS, lstrip=True),
    "both strip": lambda: chat(byte_level(post=KEEP), PHI3, special=TURNS, lstrip=True, rstrip=True),
    "llama 3": lambda: chat(
        byte_level([split(LLAMA3_WORDS)], post=KEEP, ignore_merges=True), LLAMA3, bos="<bot>", special=HEADERS
    ),
    "qwen 2.5": lambda: chat(
        byte_level([split(QWEN_WORDS)], post=KEEP, normalizer=normalizers.NFC()), CHATML, special=IM
    ),
    "gemma": lambda: chat(
        sentencepiece(METASPACE, pre.Split(" ", "merged_with_previous")),
        GEMMA,
        bos="<bos>",
        special=("<start_of_turn>", "<end_of_turn>"),
    ),
    "falcon": lambda: chat(falcon(), FALCON, special=("<|im_end|>",)),
    "t5": lambda: chat(unigram(), VICUNA),
}


def chat(core, template, *, bos=None, eos="</s>", special=(), lstrip=False, rstrip=False) -> ChatTokenizer:
    """Add special tokens and the template. Only `special`, not bos and eos, take blanks."""
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (bos, eos) if t])
    sides = {"lstrip": lstrip, "rstrip": rstrip}
    core.add_special_tokens([AddedToken(t, special=True, normalized=False, **sides) for t in special])
    raw = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos)
    return chat_tokenizer(raw, template)
