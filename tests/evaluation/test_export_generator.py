"""`sid-ray export`: a generator leaves its run, whole, alone, and over nothing."""

import shutil
import sys

import pytest
import torch

from sid_ray import load_generator
from sid_ray.errors import UserError
from sid_ray.evaluation.export_generator import export_generator
from sid_ray.teachers.model_directory import ModelConfig, load_model, save_model
from tests.launching import upload


@pytest.fixture
def run(tmp_path, tiny_teacher):
    """A folder like a run's, with a generator in it."""
    denoiser, config = load_model(str(tiny_teacher))
    made = ModelConfig(kind="generator", network=config.network, label_names=config.label_names, sigma_init=2.5)
    save_model(tmp_path / "run" / "generator", denoiser.state_dict(), made, "# card\n")
    (tmp_path / "run" / "config.yaml").write_text("secret: path\n")
    (tmp_path / "run" / "generator" / "notes.txt").write_text("mine\n")
    return tmp_path / "run"


def test_what_is_exported_is_the_generator_and_no_more(run, tmp_path):
    assert export_generator(str(run), str(tmp_path / "out")) == str(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "model.safetensors", "config.json", "README.md", "samples.png",
    }  # fmt: skip
    export_generator(str(run / "generator"), str(tmp_path / "again"))
    one, other = (load_generator(str(p)).sample(3, seed=1) for p in (run / "generator", tmp_path / "again"))
    assert torch.equal(one, other)


def test_to_s3_and_from_there(run, tmp_path, bucket):
    export_generator(str(run), f"s3://{bucket}/models/digits")
    shutil.copytree(run, tmp_path / "copy")
    there = upload(tmp_path / "copy", bucket, "runs/one")
    export_generator(there, str(tmp_path / "back"))
    one, other = (load_generator(p).sample(3, seed=1) for p in (f"s3://{bucket}/models/digits", str(tmp_path / "back")))
    assert torch.equal(one, other)
    with pytest.raises(UserError, match=r"--to: 's3://.*/models/digits' exists already"):
        export_generator(str(run), f"s3://{bucket}/models/digits")


def test_nothing_is_overwritten_and_what_is_missing_is_named(run, tmp_path, monkeypatch, capsys):
    from sid_ray.cli import main

    (tmp_path / "out").mkdir()
    for arguments, words in (
        ([str(run), "--to", str(tmp_path / "out")], "exists already"),
        ([str(run), "--to", "https://example.org/x"], "allowed: a folder that is not there yet, or s3://"),
        ([str(tmp_path / "nothing"), "--to", str(tmp_path / "new")], "is not a model directory"),
        (["builtin:digits", "--to", str(tmp_path / "new")], "holds a teacher, not a one-step generator"),
    ):
        monkeypatch.setattr(sys, "argv", ["sid-ray", "export", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists() and not any((tmp_path / "out").iterdir())
