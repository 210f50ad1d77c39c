"""JSON schemas of KubeRay's `ray.io/v1` objects, as far as deploy/kubernetes uses them.

Written from the field tables of KubeRay's API reference, with `authOptions` of 1.5.1; its CRD is in no package that
can be installed here. Unknown fields are errors. Pods are checked against Kubernetes' own schemas elsewhere.
"""

from typing import Any


def _object(required: list[str] | None = None, **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": required or [], "additionalProperties": False}


TEXT, NUMBER, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD_TEMPLATE = {"type": "object", "required": ["spec"]}
METADATA = {"type": "object", "required": ["name"]}

HEAD_GROUP = _object(
    ["template", "rayStartParams"],
    template=POD_TEMPLATE,
    rayStartParams=TEXTS,
    headService={"type": "object"},
    enableIngress=YES_OR_NO,
    serviceType=TEXT,
)
WORKER_GROUP = _object(
    ["groupName", "template", "rayStartParams", "maxReplicas", "minReplicas"],
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    idleTimeoutSeconds=NUMBER,
    numOfHosts=NUMBER,
    suspend=YES_OR_NO,
    rayStartParams=TEXTS,
    template=POD_TEMPLATE,
    scaleStrategy={"type": "object"},
)
AUTOSCALER = _object(
    idleTimeoutSeconds=NUMBER,
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    version={"enum": ["v1", "v2"]},
    image=TEXT,
    imagePullPolicy=TEXT,
    resources={"type": "object"},
    env={"type": "array"},
    envFrom={"type": "array"},
    securityContext={"type": "object"},
    volumeMounts={"type": "array"},
)
CLUSTER_SPEC = _object(
    ["headGroupSpec"],
    rayVersion=TEXT,
    authOptions=_object(["mode"], mode={"enum": ["token", "disabled"]}),
    enableInTreeAutoscaling=YES_OR_NO,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs={"type": "array", "items": WORKER_GROUP},
    headServiceAnnotations=TEXTS,
    gcsFaultToleranceOptions={"type": "object"},
    managedBy=TEXT,
    suspend=YES_OR_NO,
)
JOB_SPEC = _object(
    ["entrypoint", "rayClusterSpec"],
    entrypoint=TEXT,
    rayClusterSpec=CLUSTER_SPEC,
    runtimeEnvYAML=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
    shutdownAfterJobFinishes=YES_OR_NO,
    ttlSecondsAfterFinished=NUMBER,
    backoffLimit=NUMBER,
    activeDeadlineSeconds=NUMBER,
    entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"},
    entrypointResources=TEXT,
    clusterSelector=TEXTS,
    deletionStrategy={"type": "object"},
    jobId=TEXT,
    managedBy=TEXT,
    metadata=TEXTS,
    schedule=TEXT,
    submitterConfig={"type": "object"},
    submitterPodTemplate=POD_TEMPLATE,
    suspend=YES_OR_NO,
)


def _kind(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return _object(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": "ray.io/v1"},
        kind={"const": name},
        metadata=METADATA,
        spec=spec,
    )


KINDS = {"RayCluster": _kind("RayCluster", CLUSTER_SPEC), "RayJob": _kind("RayJob", JOB_SPEC)}
