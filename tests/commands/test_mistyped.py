"""A mistyped command, option, key or value: one line that names the near one, before anything is imported or read."""

import pytest


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("stf --train.max_steps 3", 'unknown command "stf"; did you mean "sft"?'),
        ("--modle.name x", "no command before --modle.name; lowlevel --help lists the commands"),
        ("sft --modle.name x", 'flags: unknown key "modle"; did you mean "model"?'),
        ("sft --lora.lora-alpha 1", 'flags: unknown key "lora.lora-alpha"; did you mean "lora.lora_alpha"?'),
        ("sft --learning_rate 1e-4", "unknown argument '--learning_rate'; did you mean --train.learning_rate?"),
        ("sft --lr=1", "unknown argument '--lr=1'; did you mean --train.learning_rate?"),
        ("sft --loss-type x", "unknown argument '--loss-type'; did you mean --sft.loss_type?"),
        ("sft -train.max_steps 3", "unknown argument '-train.max_steps'; did you mean --train.max_steps?"),
        ("sft -lr 1e-4", "unknown argument '-lr'; did you mean --train.learning_rate?"),
        ("sft -o x", "unknown argument '-o'; did you mean --train.output_dir?"),
        ("sft --train.learning_rate --train.max_steps 3", "--train.learning_rate needs a value"),
        (
            "sft --data.source a --data.source b",
            "--data.source is given twice: a and b; [[data.sources]] in a run file mixes several",
        ),
        ("sft --lam 1", "unknown argument '--lam'; lam is a key of ppo"),
        ("kto --beta 1", "unknown argument '--beta'; did you mean --kto.beta?"),
        ("dpo --grpo.beta 1", 'flags: [grpo] is not used when method = "dpo"; did you mean dpo.beta?'),
        (
            "reward --grpo.beta 0.1",
            'flags: [grpo] is not used when method = "reward"; beta is a key of dpo, kto, grpo, rloo, ppo, online_dpo',
        ),
        (
            "sft \u2014train.max_steps 3",
            "'\u2014train.max_steps' begins with a long dash: write two hyphens, --train.max_steps",
        ),
        (
            "sft train.max_steps=3",
            "train.max_steps=3: no such run file; flags begin with two hyphens: --train.max_steps 3",
        ),
        ("sft --data x", "unknown argument '--data'; did you mean --data.source?"),
        ("plan sft", "sft: no such run file; a method is --method sft"),
        ("dpo --resum", "unknown argument '--resum'; did you mean --resume?"),
        (
            "data --resume",
            "unknown argument '--resume'; it is an option of demo, sft, dpo, kto, reward, grpo, rloo, ppo, online_dpo, "
            "annotate: leave it out",
        ),
        ("compare x --model.name y", "unknown argument '--model.name'; lowlevel compare --help lists the options"),
        (
            "sft --train.lr_scheduler_type cosin",
            "flags: train.lr_scheduler_type: expected 'cosine', 'linear' or 'constant' (did you mean \"cosine\"?), got "
            "'cosin'",
        ),
        (
            "sft --train.report_to wand",
            "flags: train.report_to.0: expected 'tensorboard', 'wandb' or 'trackio' (did you mean \"wandb\"?), got "
            "'wand'",
        ),
    ],
)
def test_the_line_names_what_was_meant(cli, line, expected):
    said = cli(*line.split())
    assert (said.code, said.out, said.err) == (2, "", f"error: {expected}\n")


@pytest.mark.parametrize(("text", "near"), [("[trian]\nmax_steps = 3", "train"), ('metod = "sft"', "method")])
def test_a_mistyped_section_of_a_run_file(cli, tmp_path, text, near):
    (tmp_path / "run.toml").write_text(text)
    said = cli("sft", tmp_path / "run.toml")
    assert said.code == 2 and said.err.endswith(f'; did you mean "{near}"?\n') and said.err.count("\n") == 1
