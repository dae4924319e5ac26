"""cluster.yaml and jobs/rayjob.yaml are checked offline: by Ray's schema and preparation, and by what KubeRay takes."""

import copy
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipeline.cli import parse
from pipeline.config import TrainRun
from pipeline.presets import PRESETS

SECRET = re.compile(
    r"(?:AKIA|ASIA)[A-Z0-9]{16}|[A-Za-z0-9/+]{40}|[0-9a-f]{32,}|BEGIN [A-Z ]*PRIVATE KEY|eyJ[\w-]{20,}"
    r"|(?i:\b(?:\w+_)?(?:token|password|secret_access_key|access_key_id)\s*[:=]\s*[\"']?(?!\.\.\.)\w)"
)
"""Keys of AWS, long random strings, private keys and tokens by their form; and a value beside a telling name."""


def closed(required: str = "", **properties: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {
        "type": "object", "properties": properties, "required": required.split(), "additionalProperties": False,
    }  # fmt: skip


def texts(pattern: str = "") -> dict[str, Any]:
    return {"type": "object", "additionalProperties": {"type": "string", "pattern": pattern}}


NAME, WHOLE, YES_NO = (
    {"type": "string", "pattern": "^[a-z0-9.-]+$"},
    {"type": "integer", "minimum": 0},
    {"type": "boolean"},
)
TEXT = {"type": "string", "minLength": 1}
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(m|Mi|Gi)?$"}}
RESOURCES = closed("requests limits", requests=QUANTITIES, limits=QUANTITIES)
CONTAINER_SECURITY = closed(
    "allowPrivilegeEscalation capabilities",
    allowPrivilegeEscalation={"const": False},
    capabilities=closed("drop", drop={"const": ["ALL"]}),
)
POD = closed(
    "metadata spec",
    metadata=closed("labels", labels=texts()),
    spec=closed(
        "serviceAccountName terminationGracePeriodSeconds securityContext containers",
        serviceAccountName=NAME,
        automountServiceAccountToken=YES_NO,
        nodeSelector=texts(),
        tolerations={
            "type": "array",
            "items": closed(
                "operator", key=TEXT, value=TEXT, operator={"enum": ["Exists", "Equal"]},
                effect={"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            ),
        },
        terminationGracePeriodSeconds=WHOLE,
        securityContext=closed(
            "runAsNonRoot runAsUser seccompProfile",
            runAsNonRoot={"const": True},
            runAsUser={"type": "integer", "minimum": 1},
            fsGroup=WHOLE,
            seccompProfile=closed("type", type={"const": "RuntimeDefault"}),
        ),
        containers={
            "type": "array", "minItems": 1, "maxItems": 1,
            "items": closed(
                "name image securityContext resources",
                name=NAME,
                image=TEXT,
                securityContext=CONTAINER_SECURITY,
                env={"type": "array", "items": closed("name value", name=TEXT, value=TEXT)},
                envFrom={
                    "type": "array",
                    "items": closed("secretRef", secretRef=closed("name", name=NAME, optional=YES_NO)),
                },
                resources=RESOURCES,
            ),
        },
    ),
)  # fmt: skip
"""What of a pod stands in the file, stricter than Kubernetes: without a security context it is refused."""
RAY_JOB = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=closed("name", name=NAME, namespace=NAME),
    spec=closed(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=WHOLE,
        shutdownAfterJobFinishes=YES_NO,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        rayClusterSpec=closed(
            "rayVersion authOptions headGroupSpec workerGroupSpecs",
            rayVersion={"type": "string", "pattern": r"^\d+\.\d+\.\d+$"},
            authOptions=closed("mode", mode={"enum": ["disabled", "token"]}),
            enableInTreeAutoscaling=YES_NO,
            autoscalerOptions=closed(
                idleTimeoutSeconds=WHOLE, securityContext=CONTAINER_SECURITY, resources=RESOURCES,
            ),
            headGroupSpec=closed(
                "rayStartParams template",
                serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                rayStartParams=texts(),
                template=POD,
            ),
            workerGroupSpecs={
                "type": "array",
                "items": closed(
                    "groupName minReplicas maxReplicas rayStartParams template",
                    groupName=NAME, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, rayStartParams=texts(),
                    template=POD,
                ),
            },
        ),
    ),
)  # fmt: skip
"""The fields of KubeRay's RayJob (1.5 to 1.6, ``ray.io_rayjobs.yaml``) that the file uses, with their types."""
PEER = closed(podSelector={"type": "object"}, namespaceSelector={"type": "object"})
NETWORK_POLICY = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "networking.k8s.io/v1"},
    kind={"const": "NetworkPolicy"},
    metadata=closed("name", name=NAME),
    spec=closed(
        "podSelector policyTypes ingress",
        podSelector=closed("matchLabels", matchLabels=texts()),
        policyTypes={"const": ["Ingress"]},
        ingress={"type": "array", "items": closed("from", **{"from": {"type": "array", "items": PEER}})},
    ),
)


@pytest.fixture(scope="module")
def cluster(repository: Path) -> dict[str, Any]:
    return yaml.safe_load((repository / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    import ray

    return json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.fixture(scope="module")
def job(repository: Path) -> dict[str, Any]:
    return next(yaml.safe_load_all((repository / "jobs/rayjob.yaml").read_text()))


@pytest.fixture(scope="module")
def policy(repository: Path) -> dict[str, Any]:
    return list(yaml.safe_load_all((repository / "jobs/rayjob.yaml").read_text()))[1]


def head_of(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["rayClusterSpec"]["headGroupSpec"]


def worker_of(job: dict[str, Any]) -> dict[str, Any]:
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def test_follows_rays_schema(cluster, schema):
    jsonschema.validate(cluster, schema)


def test_schema_would_refuse_a_misspelt_key(cluster, schema):
    broken = copy.deepcopy(cluster)
    broken["available_node_types"]["gpu_spot"]["max_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        jsonschema.validate(broken, schema)


def test_ray_prepares_and_validates_it(cluster):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    assert prepared["available_node_types"]["gpu_spot"]["min_workers"] == 0


def test_gpu_workers_are_spot_and_head_takes_no_tasks(cluster):
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert types["gpu_spot"]["resources"]["GPU"] == 1


def test_cluster_is_closed_to_strangers(cluster):
    head = " ".join(cluster["head_start_ray_commands"])
    worker = " ".join(cluster["worker_start_ray_commands"])
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_JOB_STOP_WAIT_TIME_S=30" in head  # else a job has 3 s to save the step that it is at
    assert "RAY_AUTH_MODE=token" in worker
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in json.dumps(cluster)


@pytest.mark.parametrize("name", ["cluster.yaml", "jobs/rayjob.yaml"])
def test_no_secret_stands_in_the_file(name: str, repository: Path):
    assert not SECRET.search((repository / name).read_text())


@pytest.mark.parametrize(
    "line",
    [
        "  token: 0123456789abcdef0123456789abcdef",
        "export AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "- {name: AWS_ACCESS_KEY_ID, value: AKIAIOSFODNN7EXAMPLE}",
        "RAY_AUTH_TOKEN=hunter2",
        "password: hunter2",
    ],
)
def test_a_secret_would_be_seen(line: str):
    assert SECRET.search(line)


def test_ray_job_has_no_key_that_kuberay_lacks(job, policy):
    jsonschema.validate(job, RAY_JOB)
    jsonschema.validate(policy, NETWORK_POLICY)


def _paths(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all objects in the file whose keys are the schema's."""
    free = {"labels", "nodeSelector", "requests", "limits", "rayStartParams"}
    if isinstance(node, list):
        return [found for i, item in enumerate(node) for found in _paths(item, (*path, i))]
    if not isinstance(node, dict) or (path and path[-1] in free):
        return []
    return [path, *(found for key, item in node.items() for found in _paths(item, (*path, key)))]


def test_a_misspelt_key_is_refused_wherever_it_stands(job):
    paths = _paths(job)
    assert len(paths) > 25
    for path in paths:
        broken = copy.deepcopy(job)
        node = broken
        for step in path:
            node = node[step]
        node["misspelt"] = "x"
        with pytest.raises(jsonschema.ValidationError, match="misspelt"):
            jsonschema.validate(broken, RAY_JOB)


@pytest.mark.parametrize(
    "change",
    [
        lambda job: head_of(job)["rayStartParams"].update({"num-cpus": 0}),  # KubeRay takes strings
        lambda job: worker_of(job).update(minReplicas="0"),
        lambda job: container_of(worker_of(job))["resources"]["limits"].update({"nvidia.com/gpu": 1.5}),
        lambda job: job["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"),
        lambda job: worker_of(job)["template"]["spec"].pop("securityContext"),
        lambda job: container_of(head_of(job))["env"].append({"name": "A", "value": 1}),
        lambda job: job["spec"].update(submissionMode="HttpMode"),
    ],
)
def test_a_value_of_another_type_is_refused(job, change: Callable[[dict[str, Any]], Any]):
    broken = copy.deepcopy(job)
    change(broken)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, RAY_JOB)


def test_ray_job_is_what_cluster_yaml_is(job, cluster, repository: Path):
    types, spec = cluster["available_node_types"], job["spec"]["rayClusterSpec"]
    spot, worker = types["gpu_spot"], worker_of(job)
    assert float(head_of(job)["rayStartParams"]["num-cpus"]) == types["head"]["resources"]["CPU"]
    assert (worker["minReplicas"], worker["maxReplicas"]) == (spot["min_workers"], spot["max_workers"])
    assert worker["replicas"] == worker["minReplicas"]
    for group in (head_of(job), worker):
        resources = container_of(group)["resources"]
        assert resources["requests"] == resources["limits"]  # so that Kubernetes evicts it last
    assert int(container_of(worker)["resources"]["limits"]["nvidia.com/gpu"]) == spot["resources"]["GPU"]
    assert int(container_of(worker)["resources"]["limits"]["cpu"]) <= spot["resources"]["CPU"]
    assert "nvidia.com/gpu" not in container_of(head_of(job))["resources"]["limits"]
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * cluster["idle_timeout_minutes"]
    assert re.findall(r"^ray==(\S+)$", (repository / "constraints.txt").read_text(), re.M) == [spec["rayVersion"]]
    text = (repository / "jobs/rayjob.yaml").read_text()
    assert f"rayproject/ray:{spec['rayVersion']}-" in text
    assert text.count(f" {container_of(worker)['image']}") == 3  # built once, used twice
    assert "SPOT" in worker["template"]["spec"]["nodeSelector"].values()


def test_ray_job_is_closed_to_strangers(job, policy):
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert head_of(job)["serviceType"] == "ClusterIP"
    labels = [group["template"]["metadata"]["labels"] for group in (head_of(job), worker_of(job))]
    assert labels == [policy["spec"]["podSelector"]["matchLabels"]] * 2
    head, worker = (group["template"]["spec"] for group in (head_of(job), worker_of(job)))
    assert head["serviceAccountName"] != worker["serviceAccountName"]  # KubeRay lets the head's add pods
    assert worker["automountServiceAccountToken"] is False


def test_a_pod_that_must_go_has_time_to_save(job):
    worker, head = worker_of(job)["template"]["spec"], head_of(job)["template"]["spec"]
    drain = {e["name"]: e["value"] for e in worker["containers"][0]["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    stop = {e["name"]: e["value"] for e in head["containers"][0]["env"]}["RAY_JOB_STOP_WAIT_TIME_S"]
    assert 30 <= float(drain) < worker["terminationGracePeriodSeconds"]
    assert 30 <= float(stop) < head["terminationGracePeriodSeconds"]


def test_ray_of_this_environment_knows_the_variables_of_the_ray_job(job):
    import ray

    package = Path(ray.__file__).parent
    assert "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in (package / "_private/ray_constants.py").read_text()
    assert "RAY_JOB_STOP_WAIT_TIME_S" in (package / "dashboard/modules/job/job_supervisor.py").read_text()


def test_the_command_of_the_ray_job_serves_at_first_and_again(job):
    folder, _, line = job["spec"]["entrypoint"].partition(" && ")
    words = shlex.split(line)
    run = parse(
        {name: ("", run) for name, run in PRESETS["ddlp"].items()}, words[1:], description="", default_preset="small"
    )
    assert isinstance(run, TrainRun)
    assert (folder, words[0], run.device) == ("cd /home/ray/objdyn", "jobs/train_ddlp.py", "cuda")
    assert run.resume_if_exists
    assert run.workers <= worker_of(job)["maxReplicas"]
