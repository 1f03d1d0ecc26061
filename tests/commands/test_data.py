"""`lowlevel data`: what it shows is what will be trained on."""

import json

from workspace import CHATS, PROMPTS


def test_data_shows_what_will_be_trained_on(runs, tmp_path, cli):
    rows = tmp_path / "rows.jsonl"
    long = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}
    rows.write_text("".join(json.dumps({**row, "n": i}) + "\n" for i, row in enumerate([*CHATS, long])))
    config = runs.space.write("shown", "sft", folder=tmp_path, data={"source": str(rows)})
    text = config.read_text() + '\n[[data.filters]]\ncolumn = "n"\nop = ">="\nvalue = 4\n'
    config.write_text(text)
    said = cli("data", config)
    assert said.code == 0, said.err
    facts = {line.strip(" │┃").split("│")[0].strip(): line for line in said.out.splitlines()}
    for label, number in (("rows read", 25), ("filtered out: not n >= 4", 4), ("dropped: longer than max_length", 1),
                          ("rows kept", 20)):  # fmt: skip
        assert str(number) in facts[label].replace(label, ""), label
    assert "rows.jsonl:25: prompt has " in said.out
    reply = CHATS[4]["messages"][1]["content"]
    assert f"<|user|>\n{PROMPTS[4]}</s>\n<|assistant|>\n»{reply}</s>«" in said.out, "no colours here: marked by signs"
    assert "learned tokens are between » and «" in said.out
    assert not (tmp_path / "shown").exists()
