"""Runs from a diffusers folder and from addresses on a real S3 server."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from sid_ray import load_generator
from sid_ray.config import load_config
from sid_ray.errors import UserError
from sid_ray.storage import cache_folder, s3_client
from sid_ray.teachers.model_directory import read_model_config
from sid_ray.training.board import read_metrics
from sid_ray.training.checkpoints import ROLES, complete_checkpoints, read_progress
from sid_ray.training.opening import check_inputs, open_run
from tests.diffusers_folders import write_pipeline
from tests.launching import FEW, command, upload
from tests.ranks import on_ranks
from tests.training.test_worker import assert_same, end_state

CARD = "---\nlicense: openrail\n---\n"


@pytest.fixture
def pipeline(tmp_path):
    """A tiny class-conditional DDPM pipeline."""
    write_pipeline(tmp_path / "pipeline", card=CARD, num_class_embeds=10)
    return tmp_path / "pipeline"


@pytest.mark.distributed
def test_a_diffusers_folder_is_distilled_at_every_corner(job, pipeline):
    """320 images at ZeRO 1 and 3 with dropout: the same weights, and generators that need the folder no more."""
    settings = {"teacher__path": str(pipeline), "method__dropout": 0.1, "engine__micro_batch": 32, "batch__size": 64}
    jobs = {
        "stage1": job("stage1", run__total_kimg=0.32, **settings),
        "stage3": job("stage3", run__total_kimg=0.32, engine__zero_stage=3, **settings),
        "bf16": job("bf16", run__total_kimg=0.128, engine__zero_stage=3, engine__precision="bf16", **settings),
    }
    on_ranks(2, "tests.job_worker", *jobs.values())
    shutil.rmtree(pipeline)
    start = load_file(job.runs / "stage1" / "teacher" / "model.safetensors")
    ends = {name: end_state(job.runs / name) for name in jobs}
    assert_same(ends["stage3"], ends["stage1"], tolerance=1e-5)
    for name, state in ends.items():
        for role in ROLES:
            still = [k for k, v in start.items() if torch.equal(state[f"{role}.{k}.weight"], v)]
            assert not still, f"{name}: {role} did not learn {still}"
        rows = read_metrics(job.runs / name / "metrics.jsonl")
        assert all(row.get("skipped/generator", 0) == row.get("skipped/fake_score", 0) == 0 for row in rows)
        directory = job.runs / name / "generator"
        config = read_model_config(str(directory))
        assert config.licence == "openrail" and config.network["model_type"] == "UNet2DModel"
        assert "Licence: openrail" in (directory / "README.md").read_text()
        images = load_generator(str(directory)).sample(4, seed=1, class_labels=[0, 1, 2, 9])
        assert images.shape == (4, 1, 8, 8) and images.isfinite().all()


def test_a_changed_folder_is_refused_and_augmentation_too(job, pipeline):
    config = load_config(job("changed", teacher__path=str(pipeline)))
    open_run(config)
    (pipeline / "README.md").write_text("another card")
    open_run(config)
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("epsilon", "v_prediction"))
    with pytest.raises(UserError, match="not the file that this run began with"):
        open_run(config)
    with pytest.raises(UserError, match=r"method\.augment: 0\.1 needs a network with 9 .* this one has 0; allowed: 0"):
        check_inputs(load_config(job("augmented", teacher__path=str(pipeline), method__augment=0.1)))


def test_a_converted_source_on_s3_is_compared_while_it_can_be_reached(job, pipeline, bucket):
    address = upload(pipeline, bucket, "teachers/ddpm")
    config = load_config(job("remote", teacher__path=address))
    run, _ = open_run(config)
    converted = read_model_config(str(run.teacher))
    assert converted.provenance["source"] == "ddpm" and converted.licence == "openrail"
    open_run(config)
    key = "teachers/ddpm/unet/diffusion_pytorch_model.safetensors"
    write_pipeline(pipeline, num_class_embeds=10, layers_per_block=2)
    s3_client().upload_file(str(pipeline / "unet" / "diffusion_pytorch_model.safetensors"), bucket, key)
    with pytest.raises(UserError, match="not the file that this run began with"):
        open_run(config)
    for item in s3_client().list_objects_v2(Bucket=bucket)["Contents"]:
        s3_client().delete_object(Bucket=bucket, Key=item["Key"])
    open_run(config)


@pytest.mark.distributed
@pytest.mark.slow
def test_workers_fetch_teacher_and_warm_start_themselves(job, tiny_teacher, bucket):
    """A run from s3:// model directories is the run from local ones, also when the cache is lost on the way."""
    teacher = upload(tiny_teacher, bucket, "teacher")
    local = {"engine__micro_batch": 8, "teacher__path": str(tiny_teacher), "init__fake_score": str(tiny_teacher)}
    remote = {"engine__micro_batch": 8, "teacher__path": teacher, "init__fake_score": f"{teacher}/"}
    on_ranks(2, "tests.job_worker", job("local", **local), job("remote", run__total_kimg=0.048, **remote))
    shutil.rmtree(cache_folder())
    on_ranks(2, "tests.job_worker", job("remote", **remote))
    assert read_progress(complete_checkpoints(job.runs / "remote" / "checkpoints")[0]).nimg == 96
    assert_same(end_state(job.runs / "remote"), end_state(job.runs / "local"))
    assert not (job.runs / "remote" / "teacher").exists()
    assert read_model_config(str(job.runs / "remote" / "generator")).provenance["teacher"] == "teacher"


@pytest.mark.ray
def test_the_command_line_distils_and_samples_addresses(tiny_teacher, bucket, tmp_path):
    """384 images on Ray, whose workers fetch the teacher; then the uploaded generator is sampled."""
    teacher = upload(tiny_teacher, bucket, "models/teacher")
    done = command("distill", "digits", "--teacher.path", teacher, *FEW, "--run.total_kimg", "0.384", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "digits"
    assert read_progress(complete_checkpoints(run / "checkpoints")[0]).nimg == 384
    generator = upload(run / "generator", bucket, "models/generator")
    assert command("generate", generator, "--num", "9", "--out", "grid.png", cwd=tmp_path).returncode == 0
    assert load_generator(generator).sample(2, seed=3).equal(load_generator(str(run / "generator")).sample(2, seed=3))
