"""A run on a mix of sources: stopped and resumed it is the same run, and its steps can be verified."""

import json

import lowlevel as ll


def test_a_mixed_run_resumes_and_verifies(tmp_path, capsys):
    for name, size in (("a", 12), ("b", 6)):
        rows = [{"prompt": f"{name} {i}?", "completion": f"{name}{i}"} for i in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "sources": [{"source": tmp_path / "a.jsonl", "weight": 2}, {"source": tmp_path / "b.jsonl", "weight": 1}],
        "shuffle_seed": 1,
        "max_steps": 2,
        "r": 4,
        "gradient_accumulation_steps": 1,
    }
    whole = ll.sft(output_dir=tmp_path / "whole", **settings)
    for _ in zip(range(1), ll.steps("sft", output_dir=tmp_path / "cut", **settings), strict=False):
        pass
    resumed = ll.sft(output_dir=tmp_path / "cut", resume=True, **settings)
    said = capsys.readouterr().out
    assert "resum" in said and "source     a.jsonl: 12 of 12: 66.7%, weight 66.7% of the examples" in said
    adapters = [(run.path / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, resumed)]
    assert adapters[0] == adapters[1]
    assert resumed.verify().ok
    assert json.loads((whole.path / "data_report.json").read_text())["train"]["sources"][1]["rows_kept"] == 6
