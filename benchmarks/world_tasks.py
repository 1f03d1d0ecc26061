"""Tasks of the LM Evaluation Harness as local files: questions of the demo's world with choices, replies, and texts."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.demo_base.corpus import pretraining_text
from benchmarks.demo_base.rows import check_items

SHOTS = 6
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{file}.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
fewshot_config: {{sampler: {sampler}}}
doc_to_text: "{{{{question}}}}"
"""
CHOICES = """
task: world_choices
output_type: multiple_choice
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
REPLIES = """
task: world_replies
output_type: generate_until
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 48}}
metric_list: [{{metric: exact_match, ignore_punctuation: true}}]
"""
TEXTS = """
task: world_texts
output_type: loglikelihood_rolling
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
TASKS = {"choices": CHOICES, "replies": REPLIES, "texts": TEXTS}


def write_tasks(
    folder: Path, items: int = 24, texts: int = 6, longest: int = 8, sampler: str = "first_n"
) -> dict[str, str]:
    """The task files by name, with `items` questions and `texts` texts of 1 to `longest` documents beside them.

    `sampler`: lm-eval's, of few-shot examples: `first_n`, the same for all items as in MMLU, or `default`, drawn for
    each item as in gsm8k.
    """
    drawn = [item for item in check_items(2 * (items + SHOTS), seed=1) if not item.system and len(item.wrong) > 1]
    rows = [{"question": item.turns[-1], "choices": [item.answer, *item.wrong[:3]]} for item in drawn[: items + SHOTS]]
    documents = pretraining_text(3, texts * longest)
    parts = [documents[i * longest : i * longest + 1 + i % longest] for i in range(texts)]
    files = {
        "choices": rows[:items],
        "shots": rows[items:],
        "texts": [{"question": "\n".join(p), "choices": ["-"]} for p in parts],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, text in TASKS.items():
        file = "texts" if name == "texts" else "choices"
        (folder / f"{name}.yaml").write_text(
            (text + DATA).format(folder=folder, file=file, sampler=sampler), encoding="utf-8"
        )
    return {name: str(folder / f"{name}.yaml") for name in TASKS}
