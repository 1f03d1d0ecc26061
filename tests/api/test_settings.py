"""Keyword arguments are the keys of a run file."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import lowlevel as ll
from lowlevel.errors import ConfigError, errors_for_python

LARGE = ("torch", "transformers", "datasets", "numpy", "peft", "bitsandbytes", "matplotlib", "rich", "pydantic")


def test_keys_by_name_and_by_section():
    flat = ll.configure("dpo", beta=0.3, r=8, max_steps=5, every=2, model="x", data="y", format="orca")
    sections = ll.configure(
        "dpo", dpo={"beta": 0.3}, lora={"r": 8}, train={"max_steps": 5}, trace={"every": 2}, model="x",
        data="y", format="orca",
    )  # fmt: skip
    assert flat == sections
    assert (flat.model.name, flat.data.source, flat.dpo.beta, flat.lora.r) == ("x", "y", 0.3, 8)
    assert ll.configure("sft", loss_kwargs={"a": 1}).sft.loss_kwargs == {"a": 1}
    assert ll.configure("dpo").train.learning_rate == 1e-5 and ll.configure("sft").train.learning_rate == 2e-4


def test_a_key_goes_before_its_section():
    config = ll.configure("sft", train={"max_steps": 5, "seed": 1}, seed=2)
    assert (config.train.max_steps, config.train.seed) == (5, 2)


def test_a_run_file_and_keys_that_replace_its_own(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('method = "dpo"\n[dpo]\nbeta = 0.4\nloss_type = "ipo"\n[train]\nmax_steps = 7\nseed = 5\n')
    config = ll.configure("dpo", file=file, max_steps=3, data=[{"prompt": "p", "chosen": "c", "rejected": "r"}])
    assert (config.dpo.beta, config.dpo.loss_type, config.train.max_steps, config.train.seed) == (0.4, "ipo", 3, 5)
    assert len(config.data.source.rows) == 1
    with pytest.raises(ConfigError, match="method"):
        ll.configure("sft", file=file)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"max_step": 5}, 'did you mean "max_steps"'),
        ({"betas": 0.1}, 'did you mean "beta"'),
        ({"rank": 5}, 'did you mean "r"'),
        ({"lora": {"rank": 5}}, 'did you mean "lora.r"'),
        ({"train_dataset": []}, 'did you mean "data"'),
        ({"peft_config": {}}, 'did you mean "lora"'),
        ({"zzzzzz": 1}, "lowlevel dpo --help"),
        ({"lam": 0.9}, "lam is a key of ppo"),
        ({"train": {"max_step": 5}}, 'did you mean "train.max_steps"'),
        ({"loss": partial(max, 1)}, "loss: got a partial, expected a function; loss_kwargs"),
        ({"loss": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"max_steps": "5"}, "train.max_steps"),
        ({"beta": -1.0}, "dpo.beta"),
        ({"calbacks": []}, 'did you mean "callbacks"'),
    ],
    ids=lambda value: str(value)[:20],
)
def test_wrong_keys_and_values_are_named_before_any_work(settings, text, tmp_path):
    with pytest.raises(ConfigError) as caught:
        ll.dpo(data=[{"prompt": "p", "chosen": "c", "rejected": "r"}], output_dir=tmp_path / "a", **settings)
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2 and not (tmp_path / "a").exists()


def test_a_resolved_configuration_takes_no_settings():
    with pytest.raises(ConfigError, match="max_steps"):
        ll.train(ll.configure("sft"), max_steps=3)


def test_the_module_lists_its_api_and_imports_nothing_heavy():
    assert set(ll.__all__) <= set(dir(ll)) and {"sft", "dpo", "steps", "Run", "loss", "Callback"} <= set(ll.__all__)
    for name in ll.__all__:
        assert getattr(ll, name).__doc__, name
    code = (
        "import sys, time; start = time.perf_counter(); import lowlevel; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'datasets', 'rich'} & sys.modules.keys()\n"
        "print(sorted(heavy), took)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy, took = out.rsplit(" ", 1)
    assert heavy == "[]" and float(took) < 0.3, out
    with pytest.raises(AttributeError, match="no attribute 'sftt'"):
        ll.sftt  # noqa: B018


SCRIPT = """
from collections.abc import Mapping

import lowlevel as ll
from torch import Tensor
from torch.nn.functional import logsigmoid

@ll.loss
def mine(pairs: ll.PairLogps, *, beta: float) -> Tensor:
    return -logsigmoid(beta * pairs.deltas)

@ll.loss(mixes_pairs=True)
def other(pairs: ll.PairLogps, *, beta: float) -> tuple[Tensor, dict[str, Tensor]]:
    return mine(pairs, beta=beta), {}

class Watch(ll.Callback):
    def on_log(self, record: Mapping[str, object]) -> None: ...

run: ll.Run = ll.dpo(data=[{"prompt": "p"}], loss=mine, beta=0.2, callbacks=[Watch()])
for step in ll.steps("dpo", data=[], max_steps=2):
    number: int = step.step
    margins: Tensor = step.examples["rewards/margins"]
first: float = run.inspect(step=1).loss
reveal_type(run.verify())
reveal_type(run.replay(1))
wrong: int = run.generate("x")
"""


@pytest.mark.slow
def test_a_users_script_passes_mypy(tmp_path):
    """All but its last line; what is imported only for the package's own use is left out, it takes minutes."""
    script, options = tmp_path / "script.py", tmp_path / "mypy.ini"
    script.write_text(SCRIPT, encoding="utf-8")
    skipped = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in LARGE)
    options.write_text(f"[mypy]\nstrict = True\nignore_missing_imports = True\nfollow_imports = silent\n{skipped}")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", f"--config-file={options}", f"--cache-dir={tmp_path / 'cache'}", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "MYPYPATH": str(Path(ll.__file__).parents[1])},
        cwd=tmp_path,
    )
    notes, errors = ([line for line in done.stdout.splitlines() if f" {kind}:" in line] for kind in ("note", "error"))
    assert len(errors) == 1 and 'expression has type "str"' in errors[0], done.stdout + done.stderr
    assert "verification.report.Report" in notes[0] and "replaying.report.Replay" in notes[1]


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("add --resume to continue it, --restart to", "add resume=True to continue it, restart=True to"),
        ("and 3 more; --on-bad-row skip continues", 'and 3 more; on_bad_row="skip" continues'),
        ("(--allow-change KEY allows one)", '(allow_change=["KEY"] allows one)'),
        ("--allow-change train.learning_rate: not", 'allow_change=["train.learning_rate"]: not'),
        ("--allow-change: out/a has", "allow_change: out/a has"),
        ("--step 9: the run has 4", "step=9: the run has 4"),
        ("use --train.precision fp32", 'use precision="fp32"'),
        ("a--resume b", "a--resume b"),
    ],
)
def test_errors_name_keywords_instead_of_flags(said, expected):
    with pytest.raises(ConfigError) as error, errors_for_python():
        raise ConfigError(said)
    assert str(error.value) == expected


def test_model_and_adapter_are_names_or_folders(tmp_path):
    assert ll.configure("dpo", model=tmp_path, adapter=tmp_path).model.name == str(tmp_path)
    for key in ("model", "adapter"):
        with pytest.raises(ConfigError, match=f"^{key}: got a dict, expected a hub name or a folder$"):
            ll.configure("dpo", **{key: {"a": 1}})
