"""Tasks of the LM Evaluation Harness as local files: questions of the demo's world, with choices, and its facts."""

import json
from pathlib import Path

from lowlevel.demo.world import check_items

CHOICES = """
task: world_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: world_texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""
REPLIES = """
task: world_replies
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl, train: {folder}/shots.jsonl}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["\\n", "."], max_gen_toks: 40}}
metric_list: [{{metric: exact_match, ignore_punctuation: true}}]
"""
GROUP = """
group: world
task: [world_choices, world_replies]
aggregate_metric_list: [{{metric: acc, weight_by_size: true}}]
"""
FILES = {"choices": CHOICES, "texts": ROLLING, "replies": REPLIES}


def write_tasks(folder: Path, items: int = 24) -> dict[str, str]:
    """The task files by name, with `items` questions and 6 texts beside them."""
    questions = [
        {"question": item.turns[0], "choices": [item.answer, *item.wrong[:3]], "gold": 0}
        for item in check_items(4 * items, seed=1)
        if len(item.turns) == 1 and not item.system and len(item.wrong) >= 2
    ]
    texts = [{"text": " ".join(f"{q['question']} {q['choices'][0]}." for q in questions[k : k + n])} for k, n in
             ((0, 1), (1, 3), (4, 8), (2, 2), (12, 4), (0, 60))]  # fmt: skip
    rows = {"choices": questions[:items], "shots": questions[items : items + 6], "texts": texts}
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    return {name: str(folder / f"{name}.yaml") for name in FILES}
