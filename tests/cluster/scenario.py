"""The cluster path as docs/cluster.md tells it, run for real; `test_cluster.py` runs this file inside namespaces.

Two hosts, reached by SSH alone, become a Ray cluster by `ray up` of deploy/on-premises.yaml with its addresses
changed; jobs are submitted through the tunnel of `ray dashboard`, and their runs lie on an S3 server.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from sid_ray.storage.s3 import S3Folder
from tests.cluster.hosts import CLIENT, environment_of_hosts, host, isolated, network, passwd_of, run
from tests.launching import ROOT, s3_settings

RAY = str(Path(sys.executable).parent / "ray")
DASHBOARD = "http://127.0.0.1:8265"
STORAGE = "s3://a-bucket/runs"
JOB = [
    "python", "-m", "sid_ray", "distill", "digits", "--run.storage", STORAGE, "--cluster.workers", "2",
    "--cluster.cpus_per_worker", str(os.cpu_count()),  # a worker fills a host
    "--run.report_every_kimg", "0.256", "--run.checkpoint_every_kimg", "1.28", "--evaluation.every_kimg", "51.2",
    "--evaluation.num_images", "100", "--evaluation.teacher_steps", "3", "--evaluation.confirmations", "1",
]  # fmt: skip
SPACE = """\
description: A learning rate per host.
preset: digits
budget_kimg: 7.68
search: grid
settings:
  cluster.workers: 1
  evaluation.every_kimg: 0.64
  evaluation.num_images: 100
  evaluation.teacher_steps: 0
  evaluation.confirmations: 1
  run.checkpoint_every_kimg: 0.64
power_law: false
fields:
  optimizer.generator_lr: [1.0e-4, 2.0e-4]
"""
MINUTES = 10


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    assert isolated(), "only test_cluster.py runs this file: outside namespaces it would end other people's Ray"
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def home(scratch):
    """The client's home, with an SSH key and a Ray token."""
    folder = scratch / "client"
    (folder / ".ssh").mkdir(parents=True)
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / ".ssh/id_ed25519"))
    (scratch / "tmp-ray").mkdir()
    os.makedirs("/tmp/ray", exist_ok=True)
    run("mount", "--bind", str(scratch / "tmp-ray"), "/tmp/ray")
    run("mount", "--bind", str(passwd_of(folder, scratch)), "/etc/passwd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("SID_RAY_CACHE", str(folder / "cache"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_MODE", raising=False)
        yield folder


@pytest.fixture(scope="module")
def hosts(scratch, home):
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    wanted = "\n".join(project["dependencies"] + project["optional-dependencies"]["cluster"])
    python = environment_of_hosts(scratch, f"{wanted}\n{(ROOT / 'constraints.txt').read_text()}")
    key = (home / ".ssh/id_ed25519.pub").read_text()
    with network(), host(0, scratch, key, python) as head, host(1, scratch, key, python) as worker:
        yield head, worker


@pytest.fixture(scope="module")
def s3(hosts):
    """An S3 server at the client, with a bucket; returns the settings that reach it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=CLIENT, port=5000, verbose=False)
    server.start()
    settings = s3_settings(f"http://{CLIENT}:5000")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="a-bucket")
        yield settings
    server.stop()


@pytest.fixture(scope="module")
def cluster(scratch, hosts):
    """deploy/on-premises.yaml with these hosts' addresses and user; nothing else is changed."""
    head, worker = hosts
    config = yaml.safe_load((ROOT / "deploy/on-premises.yaml").read_text())
    config["provider"] |= {"head_ip": head.address, "worker_ips": [worker.address]}
    config["auth"]["ssh_user"] = "root"
    path = scratch / "on-premises.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


@pytest.fixture(scope="module")
def runtime_envs(scratch, s3):
    """Files for --runtime-env: (deploy/runtime-env.yaml and the way to S3, the latter alone)."""
    shipped = yaml.safe_load((ROOT / "deploy/runtime-env.yaml").read_text())["env_vars"]
    assert int(shipped["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    for name, variables in {"patient": shipped | s3, "plain": s3}.items():
        (scratch / f"{name}.yaml").write_text(yaml.safe_dump({"env_vars": variables}))
    return str(scratch / "patient.yaml"), str(scratch / "plain.yaml")


@pytest.fixture(scope="module")
def tunnel(cluster):
    """`ray dashboard`, left open, and the settings with which `ray job` uses it."""
    process = subprocess.Popen(
        [RAY, "dashboard", cluster], stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_API_SERVER_ADDRESS", DASHBOARD)
        patch.setenv("RAY_AUTH_MODE", "token")
        yield process
    close(process)


def close(process):
    """End a tunnel, its SSH client with it, as Ctrl-C in its terminal does."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()


def ray(*arguments):
    """Run `ray` at the root of the repository; returns its output, which is also shown as it comes."""
    print(f"\n$ ray {' '.join(arguments)}", flush=True)
    process = subprocess.Popen(
        [RAY, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1
    )
    output = []
    for line in process.stdout:
        output.append(line)
        print(line, end="", flush=True)
    assert process.wait() == 0
    return "".join(output)


def until(true, what):
    deadline = time.monotonic() + 60 * MINUTES
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(1)


def submit(name, runtime_env, *command, folder="."):
    named = ["--no-wait", "--submission-id", name, "--runtime-env", runtime_env, "--working-dir", str(folder)]
    ray("job", "submit", *named, "--", *command)


def status(name):
    """A job's state, asked as `ray job status` does."""
    token = (Path.home() / ".ray/auth_token").read_text().strip()
    request = urllib.request.Request(f"{DASHBOARD}/api/jobs/{name}", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["status"]


def told(name):
    """The kimg of every progress line in a job's log."""
    return [float(kimg) for kimg in re.findall(r"^\s*([0-9.]+)(?: of [0-9.]+)? kimg", ray("job", "logs", name), re.M)]


def checkpoints():
    """Image counts of the complete checkpoints on S3."""
    names = S3Folder(f"{STORAGE}/digits").objects()
    return sorted(
        int(found[1]) for found in (re.match(r"checkpoints/nimg-0*(\d+)/complete.json", n) for n in names) if found
    )


def wait_for_checkpoint_after(nimg, name):
    def there():
        assert status(name) in ("PENDING", "RUNNING"), ray("job", "logs", name)
        return bool(checkpoints()) and checkpoints()[-1] > nimg

    until(there, f"a checkpoint after {nimg} images")


def test_up(hosts, home, cluster):
    ray("get-auth-token", "--generate")
    assert (home / ".ray/auth_token").stat().st_size > 20
    ray("up", "-y", cluster)
    for one in hosts:
        until(lambda one=one: any("raylet" in line for line in one.processes()), f"Ray on {one.address}")

    def nodes():
        active = ray("exec", cluster, "RAY_AUTH_MODE=token ray status").partition("Active:")[2].partition("Pending:")[0]
        return sum(int(number) for number in re.findall(r"^ +(\d+) ", active, re.MULTILINE))

    until(lambda: nodes() == len(hosts), "both hosts in ray status")


def test_the_dashboard_is_reached_through_the_tunnel_with_the_token_alone(hosts, tunnel):
    def answers():
        try:
            urllib.request.urlopen(f"{DASHBOARD}/api/jobs/", timeout=10)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    until(answers, "the tunnel")
    assert answers() == 401
    for one in hosts:
        with socket.socket() as probe:
            assert probe.connect_ex((one.address, 8265)) != 0, "the dashboard listens to the network"


def test_doctor_looks_at_every_host(hosts, tunnel, runtime_envs):
    submit("doctor", runtime_envs[0], "python", "-m", "sid_ray", "doctor", "digits", "--run.storage", STORAGE)
    until(lambda: status("doctor") not in ("PENDING", "RUNNING"), "the end of the doctor")
    log = ray("job", "logs", "doctor")
    for one in hosts:
        for found in (
            "network +reaches 1 other",
            "clock +agrees with the driver's",
            "storage +s3://",
            "teacher",
            "ports",
        ):
            assert re.search(rf"^ok +{re.escape(one.address)} +{found}", log, re.MULTILINE), (one.address, found)
    problems = len(re.findall(r"^problem ", log, re.MULTILINE))  # this machine's own, such as a full disk
    assert status("doctor") == ("FAILED" if problems else "SUCCEEDED")


def test_a_job_runs_on_both_hosts_with_its_run_on_s3(hosts, tunnel, runtime_envs):
    submit("first", runtime_envs[0], *JOB)
    wait_for_checkpoint_after(0, "first")
    for one in hosts:
        assert any("RayTrainWorker" in line for line in one.processes()), f"no worker on {one.address}"
    log = ray("job", "logs", "first")
    assert f"new run in {STORAGE}/digits" in log and "2 worker(s) on CPU" in log
    for word in ("kimg", "images/s", "ETA"):
        assert word in log


def test_tensorboard_reads_it_meanwhile(s3, scratch):
    command = [sys.executable, "-m", "sid_ray", "board", STORAGE, "--every", "2"]
    with (scratch / "board.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def tags():
        try:
            with urllib.request.urlopen("http://127.0.0.1:6006/data/plugin/scalars/tags", timeout=10) as answer:
                return json.load(answer)
        except OSError:
            return {}

    try:
        until(lambda: "loss/generator" in tags().get("digits", {}), "the run in TensorBoard")
    finally:
        process.terminate()
        process.wait()


def test_stop_writes_a_checkpoint_and_ends_well(tunnel, runtime_envs):
    before = checkpoints()[-1]
    ray("job", "stop", "first")
    assert status("first") == "STOPPED"
    log = ray("job", "logs", "first")
    assert "stopping: the workers write a checkpoint" in log and "(resumes)" in log
    last = checkpoints()[-1]
    assert last > before or last % 1280, "no checkpoint was written for the stop"
    assert last / 1000 + 0.05 >= max(told("first")), "it was told of more than was saved"  # told to one decimal


def test_without_the_wait_the_last_periodic_checkpoint_counts(tunnel, runtime_envs):
    start = checkpoints()[-1]
    submit("second", runtime_envs[1], *JOB)
    wait_for_checkpoint_after(start, "second")
    assert f"resuming {STORAGE}/digits from nimg-{start:012d}" in ray("job", "logs", "second")
    ray("job", "stop", "second")
    assert status("second") == "STOPPED"
    assert "(resumes)" not in ray("job", "logs", "second"), "it ended well: it was given more than Ray's 3 seconds"


def test_submitted_again_it_goes_on_and_ends(tunnel, runtime_envs):
    start = checkpoints()[-1]
    total = (start + 640) / 1000
    submit("third", runtime_envs[0], *JOB, "--run.total_kimg", str(total))
    until(lambda: status("third") not in ("PENDING", "RUNNING"), "the end of the job")
    log = ray("job", "logs", "third")
    assert status("third") == "SUCCEEDED", log
    assert f"resuming {STORAGE}/digits from nimg-{start:012d}" in log
    names = S3Folder(f"{STORAGE}/digits").objects().keys()
    assert {"summary.json", "fid.png", "metrics.jsonl", "generator/model.safetensors", "generator/config.json"} <= names
    assert "lease.json" not in names and not any(name.startswith(".ray/") for name in names)
    from sid_ray import load_generator

    assert load_generator(f"{STORAGE}/digits/generator").sample(2).shape == (2, 1, 8, 8)


def test_a_sweep_as_a_job_is_stopped_and_submitted_again(hosts, tunnel, runtime_envs, scratch):
    """A trial on each host, from a working directory with a space of one's own."""
    upload = scratch / "upload"
    shutil.copytree(ROOT / "sid_ray", upload / "sid_ray", ignore=shutil.ignore_patterns("__pycache__"))
    (upload / "rates.yaml").write_text(SPACE)
    fills_a_host = ["--cluster.cpus_per_worker", str(os.cpu_count())]
    job = ["python", "-m", "sid_ray", "sweep", "rates.yaml", "--run.storage", STORAGE, *fills_a_host]
    place = S3Folder(f"{STORAGE}/sweep-rates")

    def trials():
        names = [name for name in place.objects() if name.startswith("journal/")]
        return {Path(name).stem: json.loads(place.read(name)[0]) for name in names}

    def on_every_host():
        assert status("sweep") in ("PENDING", "RUNNING"), ray("job", "logs", "sweep")
        at_work = all(any("RayTrainWorker" in line for line in one.processes()) for one in hosts)
        return at_work and any(len(trial["curve"]) > 1 for trial in trials().values())

    submit("sweep", runtime_envs[0], *job, folder=upload)
    until(on_every_host, "a trial at work on every host")
    ray("job", "stop", "sweep")
    assert status("sweep") == "STOPPED"
    assert "the same command again" in ray("job", "logs", "sweep")
    stopped = trials()
    assert {trial["state"] for trial in stopped.values()} == {"running"}, "it was too quick to be stopped"

    submit("again", runtime_envs[0], *job, folder=upload)
    until(lambda: status("again") not in ("PENDING", "RUNNING"), "the end of the sweep")
    log = ray("job", "logs", "again")
    assert status("again") == "SUCCEEDED", log
    assert f"resuming sweep in {STORAGE}/sweep-rates" in log
    ended = trials()
    assert {trial["state"] for trial in ended.values()} == {"finished"}
    for name, trial in stopped.items():
        assert ended[name]["curve"][: len(trial["curve"])] == trial["curve"], name
        assert ended[name]["nimg"] == 7680
    names = place.objects().keys()
    assert {"report.md", "curves.png", "best.yaml", "best/model.safetensors"} <= names and "lease.json" not in names


def test_down_leaves_nothing_running(hosts, cluster, tunnel):
    told = ray("down", "-y", cluster)
    assert "command not found" not in told and "Exception" not in told
    close(tunnel)
    end_workers = ["ssh", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
    run(*end_workers, f"root@{hosts[1].address}", "sid-ray-env/bin/ray stop")
    until(lambda: not any(one.processes() for one in hosts), f"{[one.processes() for one in hosts]}")
