"""cluster.yaml and what lies in deploy/: valid by the schemas of those who read them, and agreeing with each other."""

import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.kuberay import KINDS
from tests.launching import ROOT

CLUSTERS = ["cluster.yaml", "deploy/on-premises.yaml"]
KUBERNETES = ["deploy/kubernetes/raycluster.yaml", "deploy/kubernetes/rayjob.yaml"]


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def pinned(package):
    """The version of a package in constraints.txt."""
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def prepared(path):
    """A cluster file with Ray's defaults filled in, as `ray up` reads it."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(read(path))


@pytest.mark.parametrize("path", CLUSTERS)
def test_ray_accepts_the_cluster_files(path):
    from ray.autoscaler._private.util import validate_config

    config = prepared(path)
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"head_start_ray_command": []})
    for local in read(path)["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).is_file(), local


@pytest.mark.parametrize("path", CLUSTERS)
def test_every_node_asks_for_the_token_and_the_dashboard_stays_inside(path):
    config = read(path)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    starts = [c for kind in ("head", "worker") for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    options = config.get("docker", {}).get("run_options", [])
    for start in starts:
        assert "RAY_AUTH_MODE=token" in start or "--env=RAY_AUTH_MODE=token" in options
    assert "--dashboard-host=127.0.0.1" in starts[0]


def test_the_aws_cluster_is_what_its_comments_say():
    config = read("cluster.yaml")
    types, docker = config["available_node_types"], config["docker"]
    head, spot, demand = types["head"], types["gpu-spot"], types["gpu-on-demand"]
    assert config["head_node_type"] == "head" and "GPU" not in head["resources"]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in demand["node_config"] and demand["max_workers"] == 0
    assert {k: v for k, v in spot["node_config"].items() if k != "InstanceMarketOptions"} == demand["node_config"]
    assert spot["resources"]["GPU"] == 4 and spot["min_workers"] == 0 and spot["max_workers"] <= config["max_workers"]
    profiles = {t["node_config"]["IamInstanceProfile"]["Name"] for t in types.values()}
    resources = read_cloudformation()["Resources"].values()
    made = {r["Properties"]["InstanceProfileName"] for r in resources if r["Type"] == "AWS::IAM::InstanceProfile"}
    assert profiles == made == {"sid-ray-head", "sid-ray-worker"}
    assert all(t["node_config"]["BlockDeviceMappings"][0]["Ebs"]["VolumeSize"] >= 100 for t in types.values())
    assert config["provider"]["cache_stopped_nodes"] is False and config["idle_timeout_minutes"] <= 15
    assert any(option.startswith("--shm-size=") for option in docker["run_options"])


def test_one_version_of_ray_and_python_everywhere():
    ray = pinned("ray")
    images = [read("cluster.yaml")["docker"][f"{kind}_image"] for kind in ("head", "worker")]
    images += re.findall(r"^FROM (\S+)", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE)
    assert len(images) == 3 and all(image.startswith(f"rayproject/ray:{ray}-py311") for image in images)
    cluster, job = (next(iter(yaml.safe_load_all((ROOT / path).read_text()))) for path in KUBERNETES)
    assert cluster["spec"]["rayVersion"] == job["spec"]["rayClusterSpec"]["rayVersion"] == ray


@pytest.mark.parametrize("path", KUBERNETES)
def test_kubernetes_objects(path):
    """Ray's parts by a schema from KubeRay's reference, pods and the rest by Kubernetes' own, strictly."""
    first, *others = yaml.safe_load_all((ROOT / path).read_text())
    jsonschema.validate(first, KINDS[first["kind"]])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(first | {"spec": first["spec"] | {"workerGroupSpec": []}}, KINDS[first["kind"]])
    spec = first["spec"].get("rayClusterSpec", first["spec"])
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    version = kubernetes_validate.latest_version()
    for pod in pods:
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}
        kubernetes_validate.validate(whole, version, strict=True)
        assert {m["name"] for c in pod["containers"] for m in c["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        assert [m["mountPath"] for m in pod["containers"][0]["volumeMounts"]] == ["/dev/shm"]
    for other in others:
        kubernetes_validate.validate(other, version, strict=True)
    assert {pod["serviceAccountName"] for pod in pods} == {other["metadata"]["name"] for other in others}
    assert spec["authOptions"] == {"mode": "token"}
    gpus = [int(p["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)) for p in pods]
    assert gpus[0] == 0 and gpus[1] > 0


def test_the_kubernetes_job_and_cluster_are_the_same_cluster():
    cluster, job = (next(iter(yaml.safe_load_all((ROOT / path).read_text()))) for path in KUBERNETES)
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == read("deploy/runtime-env.yaml")


def test_the_kubernetes_job_is_a_command_that_runs_on_what_it_asks_for():
    from sid_ray.cli import parse_overrides
    from sid_ray.config import load_config

    job = next(iter(yaml.safe_load_all((ROOT / "deploy/kubernetes/rayjob.yaml").read_text())))["spec"]
    program, command, preset, *arguments = job["entrypoint"].split()
    assert (program, command) == ("sid-ray", "distill")
    config = load_config(preset, parse_overrides(arguments))
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.use_gpu is True and config.cluster.workers <= gpus * group["maxReplicas"]


def test_what_a_job_uploads_is_small_and_runs(tmp_path):
    """Ray's own packing of `--working-dir .` with .rayignore, unpacked and started elsewhere."""
    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(ROOT), package, include_gitignore=True)
    assert package.stat().st_size < 4e6
    with zipfile.ZipFile(package) as zipped:
        tops = {name.partition("/")[0] for name in zipped.namelist()}
        zipped.extractall(tmp_path / "job")
    assert "sid_ray" in tops and not tops & {".git", ".venv", "tests", "docs", "runs", "deploy", "benchmarks"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "sid_ray", "distill", "digits", "--dry-run"],
        cwd=tmp_path / "job", env=environment, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "builtin:digits" in done.stdout, done.stderr


def test_install_puts_torch_first_and_does_nothing_twice(tmp_path):
    """install.sh in an environment whose pip only records what it is asked for."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env/bin/python"
    pip = tmp_path / f"env/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages/pip"
    pip.mkdir()
    record = tmp_path / "calls"
    (pip / "__main__.py").write_text(
        "import sys\n"
        "wanted = sys.stdin.read().split() if '/dev/stdin' in sys.argv else []\n"
        f"print(*sys.argv[1:], *wanted, file=open({str(record)!r}, 'a'))\n"
    )
    folder = tmp_path / "sid-ray"
    folder.mkdir()
    for name in ("deploy/install.sh", "pyproject.toml", "constraints.txt"):
        (folder / Path(name).name).write_bytes((ROOT / name).read_bytes())

    def install():
        record.write_text("")
        subprocess.run(["bash", folder / "install.sh", python], check=True, timeout=60)
        return record.read_text().splitlines()

    first, rest = install()
    constrained = f"install --no-input -c {folder}/constraints.txt"
    assert first == f"{constrained} torch numpy"
    assert rest.startswith(f"{constrained} -r /dev/stdin torch>=")
    assert "deepspeed>=" in rest and "ray[default]>=" in rest and "boto3>=" in rest
    assert install() == []
    with (folder / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert len(install()) == 2


class CloudFormation(yaml.SafeLoader):
    """YAML with CloudFormation's tags, which are kept as (tag, value)."""


def _tagged(loader, suffix, node):
    return suffix, loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else node.value


CloudFormation.add_multi_constructor("!", _tagged)


def read_cloudformation():
    return yaml.load((ROOT / "deploy/aws.yaml").read_text(), CloudFormation)


def test_the_stack_is_valid_by_cfn_lint():
    done = subprocess.run(
        [Path(sys.executable).parent / "cfn-lint", ROOT / "deploy/aws.yaml"],
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
