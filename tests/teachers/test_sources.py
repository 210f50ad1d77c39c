"""Addresses are sources wherever paths are."""

import shutil
import sys

import pytest
import torch

from sid_ray.cli import main
from sid_ray.errors import UserError
from sid_ray.storage import s3_client
from sid_ray.teachers.model_directory import ASSETS, read_model_config
from sid_ray.teachers.sources import convert, load_denoiser
from tests.diffusers_folders import write_pipeline
from tests.golden_numbers import GOLDEN
from tests.launching import upload


def test_a_pickle_from_the_web_keeps_its_name_and_so_its_licence(web, tmp_path):
    folder, address = web
    shutil.copy(GOLDEN / "networks" / "ddpmpp_cond.pkl", folder / "edm-tiny.pkl")
    config = convert(f"{address}/edm-tiny.pkl", tmp_path / "out")
    assert config.licence == "CC BY-NC-SA 4.0" and config.provenance["source"] == "edm-tiny.pkl"
    local, remote = load_denoiser(str(tmp_path / "out"))[0], load_denoiser(f"{address}/edm-tiny.pkl")[0]
    assert all(torch.equal(a, b) for a, b in zip(local.parameters(), remote.parameters(), strict=True))
    with pytest.raises(UserError, match=r"^init\.generator: http.*/none\.pkl cannot be fetched"):
        load_denoiser(f"{address}/none.pkl", "init.generator")


def test_the_commands_evaluate_and_convert_take_addresses(bucket, tmp_path, monkeypatch, capsys):
    def sid_ray(*arguments):
        monkeypatch.setattr(sys, "argv", ["sid-ray", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0
        return capsys.readouterr().out

    options = ["--num", "20", "--steps", "2"]
    here = sid_ray("evaluate", "builtin:digits", *options)
    assert "FID" in here and sid_ray("evaluate", upload(ASSETS / "digits", bucket, "digits"), *options) == here
    write_pipeline(tmp_path / "p")
    assert "UNet2DModel" in sid_ray("convert", upload(tmp_path / "p", bucket, "p"), str(tmp_path / "out"))
    assert read_model_config(str(tmp_path / "out")).network == convert(str(tmp_path / "p"), tmp_path / "here").network


def test_what_an_address_does_not_hold_is_named(bucket, tmp_path):
    s3_client().put_object(Bucket=bucket, Key="empty/notes.txt", Body=b"")
    with pytest.raises(UserError, match=rf"^model: s3://{bucket}/empty: .* is not a model directory \(has no config"):
        load_denoiser(f"s3://{bucket}/empty")
    with pytest.raises(UserError, match=r"\(is a file\)"):
        load_denoiser(f"s3://{bucket}/empty/notes.txt")
    with pytest.raises(UserError, match=rf"^teacher\.path: there is nothing at s3://{bucket}/none"):
        convert(f"s3://{bucket}/none", tmp_path / "out", field="teacher.path")
    assert not (tmp_path / "out").exists()
