"""The Helm chart: rendered by Helm's own library, and checked against the schemas of what it asks of Kubernetes, and
against the server that it starts."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import anychip
from anychip.entrypoints.cli import serve
from anychip.entrypoints.cli.options import engine_config
from anychip.entrypoints.http import gate, server
from anychip.environment import Environment
from anychip.launch import async_llm, child, engine_process
from anychip.observability.metrics import Metrics

helm = pytest.importorskip("helm_python", reason="helm-python-sdk, which renders charts, is not installed")

CHART = Path(__file__).parents[2] / "deploy/helm/anychip"
IMAGE = {"image": {"repository": "registry.example/anychip"}}
DEVICES = {
    "cpu": None,
    "cuda": "nvidia.com/gpu",
    "rocm": "amd.com/gpu",
    "tpu": "google.com/tpu",
    "ascend": "huawei.com/Ascend910",
}
EVERYTHING = {
    "servedModelName": "m: 1",
    "device": {"plugin": "cuda", "count": 4},
    "settings": {"max-model-len": 1_048_576, "memory-fraction": 0.85, "no-overlap": True, "policy": "fair"},
    "strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
    "apiKeys": {"secretName": "keys"},
    "admin": {"secretName": "admin"},
    "tls": {"secretName": "tls"},
    "huggingFace": {"tokenSecretName": "hub"},
    "cache": {"size": "200Gi", "storageClassName": "fast"},
    "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True},
    "resources": {"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi"}},
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "priorityClassName": "serving",
    "runtimeClassName": "nvidia",
    "podAnnotations": {"c": "d"},
    "podLabels": {"e": "f"},
    "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
    "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
}


@pytest.fixture(scope="module")
def chart():
    with helm.Chart.load(CHART) as loaded:
        yield loaded


def rendered(chart, values: dict[str, Any] | None = None, name: str = "demo") -> dict[str, dict[str, Any]]:
    """By kind. `values` are checked as an installation checks them."""
    merged = {**IMAGE, **(values or {})}
    chart.validate_schema(chart.merge_values(merged))
    files = chart.render(merged, name=name, namespace="prod")
    documents = [yaml.safe_load(text) for path, text in files.items() if path.endswith(".yaml")]
    return {document["kind"]: document for document in documents if document}


def pod(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    return only


def parsed(arguments: list[str]) -> argparse.Namespace:
    """As `anychip serve` reads its command line."""
    parser = argparse.ArgumentParser()
    serve.add_options(parser, Environment(admin_key="secret"))
    return parser.parse_args(arguments[1:])


def test_helm_finds_no_fault():
    assert helm.lint(CHART, IMAGE, strict=True)["errors"] == []


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_object_is_as_kubernetes_has_it(chart, values, version):
    checker = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    objects = rendered(chart, values)
    own = {kind: each for kind, each in objects.items() if kind not in ("ScaledObject", "ServiceMonitor")}
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= set(own)
    for each in own.values():
        checker.validate(each, version, strict=True)


def test_what_operators_read_is_as_their_resource_definitions_have_it(chart):
    """KEDA and the Prometheus operator."""
    reason = "cloudcoil's models of these resources are not installed"
    keda = pytest.importorskip("cloudcoil.models.keda.v1alpha1", reason=reason)
    prometheus = pytest.importorskip("cloudcoil.models.prometheus_operator.v1", reason=reason)
    objects = rendered(chart, EVERYTHING)
    for model in (keda.ScaledObject, prometheus.ServiceMonitor):
        given = objects[model.__name__]
        read = model.model_validate(given).model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert read == given, "a field that the definition does not have was dropped"


def test_the_server_reads_the_command_line_that_the_chart_gives(chart):
    arguments = container(rendered(chart, EVERYTHING))["args"]
    read = parsed(arguments)
    config, how = engine_config(read), serve.server_config(read)
    assert arguments[0] == "serve"
    assert (config.model, config.device, config.tensor_parallel_size) == ("quickstart", "cuda", 4)
    assert (config.max_model_len, config.memory_fraction, config.overlap, config.policy) == (2**20, 0.85, False, "fair")
    assert (how.host, how.port, how.drain_s, how.admin_port) == ("0.0.0.0", 8000, 30.0, 9000)
    assert config.served_model_name == "m: 1"
    mounts = {mount["mountPath"] for mount in container(rendered(chart, EVERYTHING))["volumeMounts"]}
    assert {str(Path(path).parent) for path in (how.api_keys, how.tls_cert, how.tls_key)} <= mounts


def test_the_metrics_that_scale_it_are_the_servers(chart):
    metrics = Metrics("m").render().decode()
    triggers = rendered(chart, EVERYTHING)["ScaledObject"]["spec"]["triggers"]
    names = [re.findall(r"anychip_\w+", trigger["metadata"]["query"]) for trigger in triggers]
    assert names == [["anychip_num_requests_waiting"], ["anychip_kv_cache_usage_ratio"]]
    assert all(f"\n{name}{{" in metrics for (name,) in names)
    service = rendered(chart, EVERYTHING)["Service"]["metadata"]["name"]
    assert all(f'namespace="prod", service="{service}"' in trigger["metadata"]["query"] for trigger in triggers)


def test_an_autoscaler_alone_decides_the_number_of_replicas(chart):
    assert rendered(chart)["Deployment"]["spec"]["replicas"] == 1
    assert "replicas" not in rendered(chart, EVERYTHING)["Deployment"]["spec"]
    assert "ScaledObject" not in rendered(chart)


@pytest.mark.parametrize(("drain", "leave"), [(30, 10), (0, 1), (600, 20)])
def test_the_server_has_the_time_that_its_own_end_may_take(chart, drain, leave):
    objects = rendered(chart, {"server": {"drainSeconds": drain, "leaveSeconds": leave}})
    closing = async_llm._DRAIN_S + child._TERMINATE_S + child._KILL_S + engine_process._WORKERS_S + server._LAST_WORDS_S
    assert container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"] == leave
    assert serve.server_config(parsed(container(objects)["args"])).drain_s == drain
    assert pod(objects)["terminationGracePeriodSeconds"] >= leave + drain + closing


def test_probes_ask_what_needs_no_key_and_give_the_server_time_to_mend_itself(chart):
    values = {"probes": {"startupSeconds": 1801, "restartSeconds": 95}, "tls": {"secretName": "tls"}}
    probes = container(rendered(chart, values))
    allowed = {
        name: probes[name]["failureThreshold"] * probes[name]["periodSeconds"] for name in probes if "Probe" in name
    }
    assert allowed["startupProbe"] == 1805 and allowed["livenessProbe"] == 100
    paths = {name: probes[name]["httpGet"]["path"] for name in allowed}
    assert paths == {"startupProbe": "/health", "readinessProbe": "/ready", "livenessProbe": "/health"}
    assert set(paths.values()) <= gate.OPEN_PATHS
    assert {probes[name]["httpGet"]["scheme"] for name in allowed} == {"HTTPS"}


@pytest.mark.parametrize(("plugin", "resource"), DEVICES.items())
def test_a_pod_asks_for_the_devices_of_its_plugin(chart, plugin, resource):
    found = container(rendered(chart, {"device": {"plugin": plugin, "count": 2}}))
    assert found["resources"] == ({} if resource is None else {"limits": {resource: 2}})
    # One process drives all of a host's TPUs; elsewhere each device has a rank.
    assert engine_config(parsed(found["args"])).tensor_parallel_size == (1 if plugin == "tpu" else 2)


def test_a_device_of_another_name_keeps_the_limits_beside_it(chart):
    values = {
        "device": {"plugin": "strange", "count": 8, "resource": "vendor.example/chip"},
        "resources": {"limits": {"memory": "1Gi"}},
    }
    assert container(rendered(chart, values))["resources"]["limits"] == {"memory": "1Gi", "vendor.example/chip": 8}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_pod_has_no_more_rights_than_it_needs(chart, values):
    objects = rendered(chart, values)
    spec, found = pod(objects), container(objects)
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] != 0
    assert spec["automountServiceAccountToken"] is False
    assert found["securityContext"]["readOnlyRootFilesystem"]
    assert found["securityContext"]["capabilities"]["drop"] == ["ALL"]
    mounted = {mount["mountPath"] for mount in found["volumeMounts"]}
    written = [entry["value"] for entry in found["env"] if entry.get("value", "").startswith("/")]
    assert len(written) == 4 and all(any(path.startswith(at) for at in mounted) for path in written)
    assert {mount["name"] for mount in found["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}


def test_a_service_named_anychip_does_not_put_variables_into_the_servers_environment(chart):
    """Kubernetes would set ANYCHIP_PORT, which Environment.read refuses."""
    objects = rendered(chart, name="anychip")
    assert objects["Service"]["metadata"]["name"] == "anychip"
    assert pod(objects)["enableServiceLinks"] is False


def test_keys_come_from_secrets_alone(chart):
    found = container(rendered(chart, EVERYTHING))
    secrets = {entry["name"] for entry in found["env"] if "secretKeyRef" in entry.get("valueFrom", {})}
    assert secrets == {"ANYCHIP_ADMIN_KEY", "HF_TOKEN"}
    names = {f"ANYCHIP_{name.upper()}" for name in Environment.__struct_fields__}
    assert {entry["name"] for entry in found["env"] if entry["name"].startswith("ANYCHIP_")} <= names


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({"image": {"repository": ""}}, "image.repository is empty"),
        ({"settings": {"api-key": "secret"}}, "the chart sets --api-key by a value of its own"),
        ({"settings": {"port": 80}}, "the chart sets --port"),
        ({"settings": {"no-overlap": False}}, "no-overlap"),
        ({"replica": 2}, "replica"),
        ({"device": {"plugin": "cpu", "count": 0}}, "count"),
        ({"autoscaling": {"kvUsage": 1.5}}, "kvUsage"),
        ({"userId": 0}, "userId"),
    ],
)
def test_values_that_cannot_be_are_refused_by_name(chart, values, cause):
    with pytest.raises(helm.HelmError, match=re.escape(cause)):
        rendered(chart, values)


def test_the_chart_has_the_packages_version():
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == anychip.__version__
