"""cluster.yaml and deploy/aws.yaml against AWS interfaces on this machine (moto): Ray's own bootstrap, real boto3."""

import copy
import stat
from pathlib import Path

import boto3
import pytest

from tests.deploy.test_files import ROOT, prepared, read, read_cloudformation

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def aws(s3_server, tmp_path, monkeypatch):
    """An empty account; key pairs are written into a home of the test's own."""
    import requests

    requests.post(f"{s3_server}/moto-api/reset", timeout=10)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield s3_server
    requests.post(f"{s3_server}/moto-api/reset", timeout=10)


@pytest.fixture
def stack(aws):
    """deploy/aws.yaml, made as docs/cluster.md makes it; returns its outputs."""
    client = boto3.client("cloudformation")
    client.create_stack(
        StackName="sid-ray",
        TemplateBody=(ROOT / "deploy/aws.yaml").read_text(),
        Parameters=[{"ParameterKey": "BucketName", "ParameterValue": "a-bucket-of-mine"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (made,) = client.describe_stacks(StackName="sid-ray")["Stacks"]
    assert made["StackStatus"] == "CREATE_COMPLETE"
    return {output["OutputKey"]: output["OutputValue"] for output in made["Outputs"]}


@pytest.fixture
def bootstrapped(stack, monkeypatch):
    """cluster.yaml after Ray's bootstrap: what `ray up` hands to the node provider."""
    from ray.autoscaler._private.aws import config as aws_config

    for cached in (aws_config._get_subnets_or_die, aws_config.resource_cache):
        cached.cache_clear()
    assert read("cluster.yaml")["provider"]["region"] == boto3.session.Session().region_name
    return aws_config.bootstrap_aws(prepared("cluster.yaml"))


def rights(role):
    """Every statement of a role's policies, by its name."""
    role = boto3.resource("iam").Role(role)
    assert not list(role.policies.all())
    documents = [policy.default_version.document for policy in role.attached_policies.all()]
    return {statement["Sid"]: statement for document in documents for statement in document["Statement"]}


def test_workers_may_use_the_folder_of_the_bucket_and_nothing_else(stack):
    assert stack == {"Storage": "s3://a-bucket-of-mine/runs"}
    storage = rights("sid-ray-worker")
    assert storage.keys() == {"List", "Objects"}
    assert storage["List"]["Resource"] == "arn:aws:s3:::a-bucket-of-mine"
    assert storage["List"]["Condition"] == {"StringLike": {"s3:prefix": ["runs", "runs/*"]}}
    assert storage["Objects"]["Resource"] == "arn:aws:s3:::a-bucket-of-mine/runs/*"
    actions = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"}
    assert set(storage["Objects"]["Action"]) == actions
    bucket = read_cloudformation()["Resources"]["Bucket"]
    assert bucket["DeletionPolicy"] == "Retain", "taking the stack away would take the results away"
    assert list(bucket["Properties"]["PublicAccessBlockConfiguration"].values()) == [True] * 4


def test_the_head_may_also_start_machines_and_end_those_of_its_cluster(stack):
    autoscaler, storage = rights("sid-ray-head"), rights("sid-ray-worker")
    assert storage.items() <= autoscaler.items()
    assert autoscaler["GiveWorkersTheirRights"]["Action"] == "iam:PassRole"
    assert autoscaler["GiveWorkersTheirRights"]["Resource"].endswith(":role/sid-ray-worker")
    tag = {"ec2:ResourceTag/ray-cluster-name": read("cluster.yaml")["cluster_name"]}
    assert autoscaler["EndThoseOfThisCluster"]["Condition"] == {"StringEquals": tag}
    image = read("cluster.yaml")["available_node_types"]["head"]["node_config"]["ImageId"]
    parameters = autoscaler["FindTheImage"]["Resource"].partition(":parameter")[2].rstrip("*")
    assert image.startswith(f"resolve:ssm:{parameters}")


def test_bootstrap_makes_a_key_and_opens_ssh_alone(bootstrapped, aws):
    key = Path(bootstrapped["auth"]["ssh_private_key"])
    assert key.is_file() and stat.S_IMODE(key.stat().st_mode) == 0o600
    names = {t["node_config"]["KeyName"] for t in bootstrapped["available_node_types"].values()}
    assert names == {p["KeyName"] for p in boto3.client("ec2").describe_key_pairs()["KeyPairs"]} == {key.stem}
    groups = {tuple(t["node_config"]["SecurityGroupIds"]) for t in bootstrapped["available_node_types"].values()}
    ((group,),) = groups
    rules = boto3.resource("ec2").SecurityGroup(group).ip_permissions
    outside = [(r["IpProtocol"], r["FromPort"], r["ToPort"]) for r in rules if r.get("IpRanges") or r.get("Ipv6Ranges")]
    assert outside == [("tcp", 22, 22)], "something besides SSH is open to the world"
    inside = [r for r in rules if r["UserIdGroupPairs"]]
    assert [[p["GroupId"] for p in r["UserIdGroupPairs"]] for r in inside] == [[group]]
    with pytest.raises(boto3.client("iam").exceptions.NoSuchEntityException):
        boto3.client("iam").get_role(RoleName="ray-autoscaler-v1")  # Ray's own would have full rights over S3 and EC2


def launched(bootstrapped, kind, node_kind):
    """An instance of a node type, started by Ray's node provider through boto3, and what EC2 says of it."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

    provider = AWSNodeProvider(bootstrapped["provider"], bootstrapped["cluster_name"])
    tags = {TAG_RAY_NODE_KIND: node_kind, TAG_RAY_USER_NODE_TYPE: kind}
    config = copy.deepcopy(bootstrapped["available_node_types"][kind]["node_config"])
    (name,) = provider.create_node(config, tags, 1)
    (reservation,) = boto3.client("ec2").describe_instances(InstanceIds=[name])["Reservations"]
    return provider, reservation["Instances"][0]


@pytest.mark.parametrize(
    ("kind", "node_kind", "instance_type", "market"),
    [
        ("head", "head", "m7i.xlarge", None),
        ("gpu-spot", "worker", "g6e.12xlarge", "spot"),
        ("gpu-on-demand", "worker", "g6e.12xlarge", None),
    ],
)
def test_machines_are_launched_as_described_and_ended(kind, node_kind, instance_type, market, bootstrapped):
    provider, instance = launched(bootstrapped, kind, node_kind)
    assert instance["InstanceType"] == instance_type and instance.get("InstanceLifecycle") == market
    assert instance["IamInstanceProfile"]["Arn"].endswith(f"/sid-ray-{node_kind}")
    assert instance["ImageId"].startswith("resolve:ssm:")
    node_type = bootstrapped["available_node_types"][kind]["node_config"]
    assert instance["KeyName"] == node_type["KeyName"] and instance["SubnetId"] in node_type["SubnetIds"]
    assert [g["GroupId"] for g in instance["SecurityGroups"]] == node_type["SecurityGroupIds"]
    assert {t["Key"]: t["Value"] for t in instance["Tags"]}["ray-cluster-name"] == "sid-ray"
    volume = boto3.resource("ec2").Volume(instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"])
    assert volume.encrypted and (volume.volume_type, volume.size) == ("gp3", 150 if kind == "head" else 200)
    provider.terminate_nodes([instance["InstanceId"]])
    (reservation,) = boto3.client("ec2").describe_instances(InstanceIds=[instance["InstanceId"]])["Reservations"]
    assert reservation["Instances"][0]["State"]["Name"] == "terminated", "a stopped machine would cost its disk"
