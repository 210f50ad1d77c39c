"""Bad input is refused with the field, the value and what is allowed; good input resolves."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sid_ray.cli import field_help, parse_overrides
from sid_ray.config import Config, differences, fields, load_config, parse_config, settled_as
from sid_ray.errors import UserError

BAD = [
    ({"method.alpha": "abc"}, ["method.alpha", "'abc'", "number"]),
    ({"method.alpha": float("nan")}, ["method.alpha", "nan"]),
    ({"batch.size": 0}, ["batch.size", "0", "greater than or equal to 1"]),
    ({"batch.size": 100}, ["batch.size", "100", "not divisible", "multiples of 64"]),
    ({"engine.zero_stage": 4}, ["engine.zero_stage", "4", "0, 1, 2 or 3"]),
    ({"engine.zero_stage": 0, "engine.precision": "bf16"}, ["engine.zero_stage", "bf16 use 1"]),
    ({"engine.precision": "fp16"}, ["engine.precision", "'fp16'", "'fp32' or 'bf16'"]),
    ({"method.alhpa": 1}, ["method.alhpa", "no such field", "did you mean 'method.alpha'"]),
    ({"method": 1}, ["method", "no such field"]),
    ({"cluster.workers": 0}, ["cluster.workers", "0", "at least 1"]),
    ({"cluster.workers": "8-2"}, ["cluster.workers", "'8-2'", "such as '2-8'"]),
    ({"cluster.workers": "0-2"}, ["cluster.workers", "'0-2'", "such as '2-8'"]),
    ({"cluster.workers": "many"}, ["cluster.workers", "'many'", "'auto'"]),
    ({"cluster.workers": True}, ["cluster.workers", "True", "'auto'"]),
    ({"cluster.hang_timeout_seconds": 0}, ["cluster.hang_timeout_seconds", "greater than 0"]),
    ({"run.name": "../up"}, ["run.name", "'../up'"]),
    ({"optimizer.generator_lr": -1}, ["optimizer.generator_lr", "-1", "greater than 0"]),
    ({"method.class_weights": "[1, -1]"}, ["method.class_weights", "[1, -1]", "numbers of 0 or more, not all 0"]),
    ({"method.class_weights": "[0, 0]"}, ["method.class_weights", "not all 0"]),
    ({"method.class_weights": "[.nan, 1]"}, ["method.class_weights", "numbers of 0 or more"]),
    ({"method.class_weights": 3}, ["method.class_weights", "3", "list"]),
    ({"evaluation.num_images": 1}, ["evaluation.num_images", "1", "2 or more, or 0 for no evaluation"]),
    ({"method.latents": "shared", "method.memory": "lean"}, ["method.latents", "method.memory"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD, ids=[str(o) for o, _ in BAD])
def test_bad_values_are_named(overrides, words):
    with pytest.raises(UserError) as error:
        load_config("digits", overrides)
    assert [w for w in words if w not in str(error.value)] == []


def test_unknown_preset_and_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"'digit' .did you mean 'digits'"):
        load_config("digit")
    for text, word in (("a: [", "not readable as YAML"), ("- 1", "expected sections"), ("metod: {}", "no such field")):
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(UserError, match=word):
            load_config(str(file))


def test_a_resolved_configuration_reads_back():
    config = load_config("digits", {"method.alpha": "1.0", "optimizer.generator_lr": "2e-4", "cluster.workers": "3"})
    assert (config.method.alpha, config.optimizer.generator_lr, config.cluster.workers) == (1.0, 2e-4, 3)
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
    assert config.run.name == "digits"


def test_worker_counts():
    counts = {"auto": None, 3: (3, 3), "3": (3, 3), "2-8": (2, 8), "2-2": (2, 2)}
    for given_count, expected in counts.items():
        config = load_config("digits", {"cluster.workers": given_count})
        assert config.cluster.worker_range == expected
        assert parse_config(yaml.safe_load(config.to_yaml())) == config


def test_every_field_is_documented_and_in_the_help():
    text = field_help()
    for name, info in fields():
        assert info.description, name
        assert f"--{name} " in text


def test_published_defaults():
    config = Config(teacher={"path": "x"}, engine={"precision": "fp32"})
    assert (config.method.alpha, config.method.sigma_init, config.method.tmax) == (1.2, 2.5, 800)
    assert (config.method.loss_scale_generator, config.method.loss_scale_fake_score) == (100, 1)
    assert config.adam_eps == 1e-8
    assert Config(teacher={"path": "x"}, engine={"precision": "bf16"}).adam_eps == 1e-6


def test_what_is_auto_cannot_be_used_before_it_is_settled():
    config = load_config("digits", {"engine.micro_batch": "auto", "engine.precision": "auto"})
    for use in (lambda: config.num_slots, lambda: config.adam_eps, lambda: config.engine.bf16):
        with pytest.raises(ValueError, match="not settled yet"):
            use()
    settled = load_config("digits", {"engine.micro_batch": 32, "engine.precision": "bf16"})
    assert settled_as(config, settled) == settled
    own = load_config("digits", {"engine.micro_batch": 64, "engine.precision": "fp32"})
    assert settled_as(own, settled) == own


@pytest.mark.parametrize(("value", "allowed"), [("0", False), (-1, False), (1.5, False), ("many", False), (True, False),
                                                ("64", True), (32, True), ("auto", True)])  # fmt: skip
def test_micro_batch_is_a_number_or_auto(value, allowed):
    if allowed:
        expected = value if value == "auto" else int(value)
        assert load_config("digits", {"engine.micro_batch": value}).engine.micro_batch == expected
    else:
        with pytest.raises(
            UserError, match=r"engine\.micro_batch: .* is not allowed; allowed: 'auto' or a whole number"
        ):
            load_config("digits", {"engine.micro_batch": value})


def test_differences_tell_what_may_change():
    old = load_config("digits")
    new = load_config("digits", {"run.total_kimg": 400, "method.alpha": 1.0})
    free, fixed = differences(old, new)
    assert [t.split(":")[0] for t in free] == ["run.total_kimg"]
    assert [t.split(":")[0] for t in fixed] == ["method.alpha"]


@given(st.dictionaries(st.from_regex(r"[a-z]+\.[a-z_]+", fullmatch=True), st.from_regex(r"[a-z0-9.]+", fullmatch=True)))
def test_override_syntax_round_trips(overrides):
    separate = [word for k, v in overrides.items() for word in (f"--{k}", v)]
    joined = [f"--{k}={v}" for k, v in overrides.items()]
    assert parse_overrides(separate) == parse_overrides(joined) == overrides


@pytest.mark.parametrize("words", [["method.alpha", "1"], ["--method.alpha"], ["--method.alpha", "--batch.size", "1"]])
def test_broken_override_syntax(words):
    with pytest.raises(UserError, match=r"--section.field value"):
        parse_overrides(words)
