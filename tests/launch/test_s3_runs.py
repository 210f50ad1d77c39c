"""The main job with `run.storage` on S3, as a user runs it."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sid_ray.storage import cache_folder
from sid_ray.storage.s3 import S3Folder
from tests.launching import SHORT, command
from tests.training.test_worker import assert_same, end_state

pytestmark = pytest.mark.ray


def download(folder, where):
    for name in where.objects():
        where.download(name, folder / name)


@pytest.mark.slow
def test_a_run_on_s3_goes_on_from_another_machine_and_ends_the_same(whole, bucket, tmp_path):
    storage = f"s3://{bucket}/of/mine"
    first = command(*SHORT, "--run.storage", storage, "--run.total_kimg", "0.64", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"new run in {storage}/digits" in first.stdout and f"{storage}/digits/generator" in first.stdout
    shutil.rmtree(cache_folder())  # another machine has no working copy
    again = command(*SHORT, "--run.storage", storage, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resuming {storage}/digits from nimg-000000000640" in again.stdout
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == [], "something was written beside S3"
    download(tmp_path / "downloaded", S3Folder(f"{storage}/digits"))
    run, expected = tmp_path / "downloaded", whole[0] / "runs" / "digits"
    assert_same(end_state(run), end_state(expected))
    generators = [load_file(path / "generator" / "model.safetensors") for path in (run, expected)]
    assert_same(*generators)
    from sid_ray import load_generator

    assert load_generator(f"{storage}/digits/generator").sample(2, seed=1).shape == (2, 1, 8, 8)
    assert not (run / "lease.json").exists() and (run / "summary.json").is_file() and (run / "fid.png").is_file()


def test_storage_that_cannot_be_used_is_named(s3_server, tmp_path, monkeypatch):
    from sid_ray.config import load_config
    from sid_ray.errors import UserError
    from sid_ray.launch.trainer import distill

    monkeypatch.setenv("SID_RAY_CACHE", str(tmp_path / "cache"))
    config = load_config("digits", {"run.storage": "s3://no-such-bucket-anywhere/runs"})
    with pytest.raises(
        UserError, match=r"run\.storage: 's3://no-such-bucket-anywhere/runs' cannot be written: .*NoSuch"
    ):
        distill(config, quiet=True)
    assert not list(Path(tmp_path).iterdir())
