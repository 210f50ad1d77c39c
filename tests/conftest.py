"""Shared fixtures."""

import shutil

import hypothesis
import pytest
import torch
from filelock import FileLock

from sid_ray.teachers.model_directory import ModelConfig, save_model
from tests.golden_numbers import golden_denoiser, load_golden
from tests.launching import SHORT, command, s3_settings

# A busy machine must not fail a property.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


def pytest_collection_modifyitems(items):
    """What takes long comes first: `make test` shares the files out over two processes, in this order."""
    items.sort(
        key=lambda item: (item.get_closest_marker("ray") is None, item.get_closest_marker("distributed") is None)
    )


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """Model directory of a tiny class-conditional 8x8 teacher with dropout 0.13."""
    numbers, meta = load_golden("sid/cond_alpha1.2")
    network = {**meta["init_kwargs"], "dropout": 0.13}
    directory = tmp_path_factory.mktemp("tiny-teacher")
    denoiser = golden_denoiser(numbers, network, "teacher.")
    config = ModelConfig(kind="teacher", network=network, label_names=[str(i) for i in range(10)])
    save_model(directory, denoiser.state_dict(), config, "# tiny teacher of the tests\n")
    return directory


@pytest.fixture
def job(tmp_path, tiny_teacher):
    """Function that writes a YAML configuration of a few iterations and returns its path."""
    return job_writer(tmp_path, tiny_teacher)


def job_writer(tmp_path, teacher):
    """What `job` is, for a folder and a teacher."""
    from sid_ray.config import load_config

    def write(name, **overrides):
        base = {
            "teacher.path": str(teacher),
            "optimizer.generator_lr": 1e-4,
            "optimizer.fake_score_lr": 1e-4,
            "engine.micro_batch": 4,
            "batch.size": 16,
            "evaluation.every_kimg": 10,
            "evaluation.num_images": 20,
            "evaluation.teacher_steps": 2,
            "evaluation.confirmations": 0,
            "run.name": name,
            "run.storage": str(tmp_path / "runs"),
            "run.total_kimg": 0.096,
            "run.report_every_kimg": 0.048,
            "run.sample_every_kimg": 1.0,
            "run.checkpoint_every_kimg": 0.048,
        }
        config = load_config("digits", base | {k.replace("__", "."): v for k, v in overrides.items()})
        path = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(config.to_yaml())
        return str(path)

    write.runs = tmp_path / "runs"
    return write


@pytest.fixture(scope="session")
def whole(tmp_path_factory, worker_id):
    """An uninterrupted short run of the digits preset on Ray: (working directory, what it printed).

    Made once, by whichever of `make test`'s processes needs it first; no test writes into the run.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "whole-run"
    printed = folder / "printed.txt"
    with FileLock(f"{folder}.lock"):
        if not printed.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # a failed one, which another process reports
            folder.mkdir()
            done = command(*SHORT, cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr
            printed.write_text(done.stdout)
    return folder, printed.read_text()


@pytest.fixture(scope="session")
def s3_server():
    """Address of a real S3 server (moto) on this machine, to which boto3 and pyarrow go while it runs."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = s3_settings(f"http://{host}:{port}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings["AWS_ENDPOINT_URL"]
    server.stop()


@pytest.fixture
def bucket(s3_server, tmp_path, monkeypatch):
    """Name of an empty bucket; what is fetched from it is cached in a folder of the test's own."""
    import uuid

    from sid_ray.storage import s3_client

    monkeypatch.setenv("SID_RAY_CACHE", str(tmp_path / "cache"))
    name = f"bucket-{uuid.uuid4()}"
    s3_client().create_bucket(Bucket=name)
    return name


@pytest.fixture
def web(tmp_path, monkeypatch):
    """(folder, address) of an HTTP server on this machine; what is fetched is cached in a folder of the test's own."""
    import functools
    import http.server
    import threading

    monkeypatch.setenv("SID_RAY_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
