"""A loss of the user's: given by name, as a function or as "module:function", trained, logged, and refused early."""

import json

import pytest
import torch
from torch.nn.functional import logsigmoid

import lowlevel as ll
from lowlevel.cli import main
from lowlevel.errors import ConfigError
from lowlevel.methods.dpo import check_loss


def plain(pairs: ll.PairLogps, *, beta: float):
    return -logsigmoid(beta * pairs.deltas)


def shifted(pairs: ll.PairLogps, *, beta: float, gamma: float = 1.0):
    """-ls(x - gamma * score)"""
    margins = beta * pairs.deltas
    above = (margins > gamma).float()
    return -logsigmoid(margins - gamma * pairs.values["score"]), {"above": above, "score": pairs.values["score"]}


def by_token(pairs: ll.PairLogps, *, beta: float):
    """The sigmoid loss from token log-probabilities."""
    ratios = pairs.token_logps - pairs.ref_token_logps
    size = 2 * len(pairs.deltas) + 1  # one more for dummy tokens
    chosen, rejected = ratios.new_zeros(size).index_add(0, pairs.sequence_ids, ratios)[:-1].chunk(2)
    return -logsigmoid(beta * (chosen - rejected))


def doubled(tokens: ll.TokenLogps, *, factor: float = 2.0):
    return -factor * tokens.token_logps, {"probability": tokens.token_logps.exp()}


def weighted(tokens: ll.TokenLogps):
    weights = torch.cat([tokens.values["score"], tokens.token_logps.new_zeros(1)])[tokens.sequence_ids]
    return -weights * tokens.token_logps


def test_a_loss_equal_to_the_built_in_one_trains_the_same_bits(api, dpo, same):
    run = api.dpo("plain", loss=plain)
    assert same(run, dpo)
    manifest = run.folder.read_manifest()
    assert run.config.dpo.loss_type == f"{__name__}:plain" and "sha256" in json.dumps(manifest)


def test_a_loss_of_tokens_gets_their_log_probabilities(api, dpo):
    run = api.dpo("by-token", loss=ll.loss(by_token))
    assert run.config.dpo.loss_type == "by_token"
    for own, built_in in zip(run.metrics, dpo.metrics, strict=True):
        assert own["loss"] == pytest.approx(built_in["loss"], abs=2e-6)
        assert own["rewards/margins"] == pytest.approx(built_in["rewards/margins"], abs=1e-4)


def test_hyper_parameters_metrics_and_columns(api, rows):
    taken = list(
        api.steps("shifted", loss=shifted, beta=0.2, loss_kwargs={"gamma": 0.25}, columns=["score"], max_steps=2)
    )
    run = ll.Run(api.folder / "shifted", data=rows["dpo"])
    for step, record in zip(taken, run.metrics, strict=True):
        scores = torch.tensor([rows["dpo"][row]["score"] for row in step.rows])
        assert torch.equal(step.examples["score"], scores)
        expected = -logsigmoid(step.examples["rewards/margins"] - 0.25 * scores)
        assert torch.allclose(step.examples["loss"], expected, atol=1e-6)
        assert record["score"] == pytest.approx(float(scores.mean())) and 0 <= record["above"] <= 1
    pair = run.inspect(step=1, checkpoint=0).examples[0]
    assert pair.numbers["column/score"] == rows["dpo"][pair.row]["score"]
    assert {name for name in pair.numbers if name.startswith("metric/")} == {"metric/above", "metric/score"}


def test_a_token_loss_of_sft(api, sft, same, rows):
    half = api.sft("half", loss=doubled, loss_kwargs={"factor": 0.5}, lora_dropout=0.1)
    for own, built_in in zip(half.metrics, sft.metrics, strict=True):  # Adam and clipping take out the factor
        assert own["loss"] == pytest.approx(0.5 * built_in["loss"], rel=1e-3)
        assert 0 < own["probability"] < 1
    assert half.metrics[0]["loss"] == 0.5 * sft.metrics[0]["loss"]
    ones = [{**row, "score": 1.0} for row in rows["sft"]]
    assert same(api.sft("ones", ones, loss=weighted, columns=["score"]), sft)


def test_a_loss_of_a_module_through_the_command_line(api, dpo, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_losses.py").write_text(
        "from torch.nn.functional import logsigmoid\n\n\ndef mine(pairs, *, beta):\n"
        "    return -logsigmoid(beta * pairs.deltas)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = api.write("module.jsonl", [*ll.config.given.GivenRows.of(dpo.config.data.source).rows])
    file = tmp_path / "run.toml"
    file.write_text(
        f'method = "dpo"\n[data]\nsource = "{rows}"\n[lora]\nr = 4\nlora_alpha = 8\n[train]\n'
        f'output_dir = "{tmp_path}/a"\n'
        "per_device_train_batch_size = 2\ngradient_accumulation_steps = 2\nmax_steps = 2\nlogging_steps = 1\n"
        'lr_scheduler_type = "constant"\n[dpo]\nloss_type = "my_losses:mine"\n'
    )
    assert main(["dpo", str(file)]) == 0
    assert "my_losses:mine" in capsys.readouterr().out
    assert ll.Run(tmp_path / "a").metrics[0]["loss"] == dpo.metrics[0]["loss"]
    assert main(["dpo", str(file), "--dpo.loss_type", "my_losses:other", "--train.output_dir", f"{tmp_path}/b"]) == 2
    assert "my_losses:other" in capsys.readouterr().err and not (tmp_path / "b").exists()


def scalar(pairs, *, beta):
    return plain(pairs, beta=beta).mean()


def raises(pairs, *, beta):
    return pairs.no_such_attribute


def without_gradient(pairs, *, beta):
    return plain(pairs, beta=beta).detach()


def not_finite(pairs, *, beta):
    return (pairs.deltas - pairs.deltas).sqrt() * beta


def bad_metric(pairs, *, beta):
    return plain(pairs, beta=beta), {"share": 0.5}


def named_loss(pairs, *, beta):
    return plain(pairs, beta=beta), {"loss": pairs.deltas}


def bad_rows(tokens):
    return -tokens.token_logps[:1]


@pytest.mark.parametrize(
    ("method", "function", "settings", "text"),
    [
        ("dpo", scalar, {}, "expected a tensor of shape (3,)"),
        ("dpo", raises, {}, "AttributeError"),
        ("dpo", without_gradient, {}, "has no gradient"),
        ("dpo", not_finite, {}, "NaN or infinite"),
        ("dpo", bad_metric, {}, "'share'"),
        ("dpo", named_loss, {}, "a metric is named 'loss'"),
        ("dpo", plain, {"loss_kwargs": {"beta": 1.0}}, "beta is a key of its own"),
        ("dpo", shifted, {}, "KeyError: 'score'"),  # data.columns is missing
        ("dpo", plain, {"loss_kwargs": {"gama": 1.0}}, "gama"),
        ("sft", bad_rows, {}, "expected a tensor of shape (4,)"),
        ("sft", doubled, {"loss_kwargs": {"fact": 1.0}}, "fact"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_loss_is_refused_before_the_model_is_loaded(api, monkeypatch, method, function, settings, text):
    def never(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("lowlevel.running.assembly.load_base", never)
    with pytest.raises(ConfigError) as caught:
        getattr(api, method)("refused", loss=function, **settings)
    assert text in str(caught.value) and function.__name__ in str(caught.value) and "\n" not in str(caught.value)
    assert not (api.folder / "refused").exists()


def test_a_loss_that_this_process_does_not_know_is_named(api, dpo, rows):
    run = api.dpo("registered", loss=ll.loss(plain, name="for_now"), max_steps=1)
    assert run.config.dpo.loss_type == "for_now"
    from lowlevel.losses.registry import OWN

    OWN.clear()
    with pytest.raises(ConfigError, match=r"for_now.*@lowlevel\.loss") as caught:
        ll.Run(run.path, data=rows["dpo"]).inspect(step=1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'sigmoid' is a built-in loss"):
        ll.loss(plain, name="sigmoid")


def test_a_loss_that_forgets_dummy_tokens_is_refused_before_a_gpu_meets_them():
    """`sequence_ids` is 2P for a dummy token; an index of 2P into 2P sums fails on a GPU in the middle of a run."""

    def summed(pairs):
        sums = torch.zeros(2 * len(pairs.chosen_logps)).index_add(0, pairs.sequence_ids, pairs.token_logps)
        return -sums.chunk(2)[0]

    config = ll.configure("dpo", loss=ll.loss(summed, name="summed_without_dummies")).dpo
    with pytest.raises(ValueError, match="failed on a trial batch"):
        check_loss(config)
