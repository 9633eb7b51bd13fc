"""The manifests for Kubernetes and Compose: valid, of one mind with each other and with the settings."""

from __future__ import annotations

import copy
import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]  # it has no types
import pytest
import yaml

from cdc.app.config import SETTINGS
from cdc.app.ui_section import logins
from tests.fix_consumer import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
_OLDEST, _NEWEST = "1.30", "1.37"
"""Native sidecars are on from 1.29; the schemas begin with 1.30."""
_OF_ITS_OPERATOR = {"PodMonitor", "PrometheusRule"}
_NOT_FOR_THE_CLUSTER = {"Kustomization", "Component"}

Document = dict[str, Any]


def _documents(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text("utf-8")) if document]


def _sidecars() -> tuple[Document, Document]:
    """The pod of the example with the component merged into it as kustomize does, and the one that is written out."""
    [application] = _documents(KUBERNETES / "example/application.yaml")
    [patch] = _documents(KUBERNETES / "sidecar/patch.yaml")
    merged, ours = copy.deepcopy(application), patch["spec"]["template"]
    template = merged["spec"]["template"]
    template["metadata"]["labels"] |= ours["metadata"]["labels"]
    for listed in ("initContainers", "volumes"):
        template["spec"][listed] = ours["spec"][listed] + template["spec"].get(listed, [])
    template["spec"]["initContainers"][0]["image"] = "shop-consumer:1.0"
    _, written_out = _documents(KUBERNETES / "plain/sidecar.yaml")
    return merged, written_out


MANIFESTS = [
    pytest.param(document, id=f"{path.parent.name}/{path.name} {document['kind']}")
    for path in sorted(KUBERNETES.glob("*/*.yaml"))
    for document in _documents(path)
    if path.name != "patch.yaml" and document["kind"] not in _OF_ITS_OPERATOR | _NOT_FOR_THE_CLUSTER
]


@pytest.mark.parametrize("version", [_OLDEST, _NEWEST])
@pytest.mark.parametrize("document", MANIFESTS)
def test_manifests_fit_the_schemas_of_kubernetes(document: Document, version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_a_manifest_with_a_misspelt_field_does_not_fit() -> None:
    _, sidecar = _sidecars()
    sidecar["spec"]["template"]["spec"]["initContainers"][0]["restartsPolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(sidecar, _NEWEST, strict=True)


def test_the_written_out_sidecar_is_what_the_component_makes_of_the_example() -> None:
    merged, written_out = _sidecars()
    assert written_out == merged


def test_the_settings_of_the_two_sidecars_are_the_same() -> None:
    settings, _ = _documents(KUBERNETES / "plain/sidecar.yaml")
    [example] = _documents(KUBERNETES / "example/kustomization.yaml")
    [generated] = example["configMapGenerator"]
    assert settings["metadata"]["name"] == generated["name"]
    assert [f"{name}={value}" for name, value in settings["data"].items()] == generated["literals"]


def test_the_sidecar_starts_before_the_application_and_holds_nothing_up() -> None:
    _, written_out = _sidecars()
    first, *_ = written_out["spec"]["template"]["spec"]["initContainers"]
    assert (first["name"], first["restartPolicy"]) == ("cdc", "Always")
    assert "readinessProbe" not in first, "it would take the application out of its Service"
    assert "startupProbe" not in first, "it would hold back the application"
    assert first["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "cdc-metrics"}


def _pods() -> list[Any]:
    return [
        pytest.param(document["spec"]["template"]["spec"], id=f"{path.name} {document['metadata']['name']}")
        for path in sorted(KUBERNETES.glob("plain/*.yaml"))
        for document in _documents(path)
        if document["kind"] in {"Deployment", "Job"}
    ]


@pytest.mark.parametrize("pod", _pods())
def test_every_container_of_ours_has_as_few_rights_as_it_can(pod: Document) -> None:
    """The application of the sidecar's example is not ours."""
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    ours = [container for container in containers if not container["image"].startswith("shop:")]
    assert ours
    for container in ours:
        security = pod.get("securityContext", {}) | container["securityContext"]
        assert security["runAsNonRoot"]
        assert security["runAsUser"] == 65532, "the image's user"
        assert security["readOnlyRootFilesystem"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert {"memory", "ephemeral-storage"} <= container["resources"]["limits"].keys()
        assert "cpu" not in container["resources"]["limits"], "throttled, it would stall"
        token = "/var/run/secrets/kubernetes.io/serviceaccount"
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert pod.get("automountServiceAccountToken") is False or token in mounts
        assert [variable["name"] for variable in container["env"] if variable["name"] == "CDC_DSN"] == []


@pytest.mark.parametrize("pod", _pods())
def test_every_container_is_within_the_restricted_standard(pod: Document) -> None:
    """That of the cluster's pod security admission: a namespace that enforces it refuses a pod for one container."""
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        security = pod.get("securityContext", {}) | container["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security.get("runAsUser") != 0
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert [port for port in container.get("ports", []) if "hostPort" in port] == []
    assert {"hostNetwork", "hostPID", "hostIPC"}.isdisjoint(pod)
    assert [volume for volume in pod.get("volumes", []) if "hostPath" in volume] == []


def test_the_time_to_stop_is_longer_than_the_drain_time() -> None:
    drain_s = SETTINGS["drain_time"].default
    graces = {
        document["metadata"]["name"]: document["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        for name in ("consumer.yaml", "sidecar.yaml")
        for document in _documents(KUBERNETES / "plain" / name)
        if document["kind"] == "Deployment"
    }
    assert {name: grace for name, grace in graces.items() if grace <= drain_s} == {}
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["consumer"]
    assert float(compose["stop_grace_period"].removesuffix("s")) > drain_s


def test_the_pod_monitor_and_the_policy_find_the_consumers() -> None:
    [monitor] = _documents(KUBERNETES / "plain/podmonitor.yaml")
    [policy] = _documents(KUBERNETES / "plain/networkpolicy.yaml")
    [alone] = _documents(KUBERNETES / "plain/consumer.yaml")
    beside, _ = _sidecars()
    for pod, container in ((beside, "initContainers"), (alone, "containers")):
        template = pod["spec"]["template"]
        assert template["metadata"]["labels"]["cdc"] == "consumer"
        [port] = template["spec"][container][0]["ports"]
        [endpoint] = monitor["spec"]["podMetricsEndpoints"]
        assert (port["name"], port["containerPort"]) == (endpoint["port"], SETTINGS["http.port"].default)
    assert monitor["spec"]["selector"]["matchLabels"] == policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": SETTINGS["http.port"].default}]


def test_the_web_interface_is_on_a_role_of_its_own_and_lets_in_who_has_a_login() -> None:
    deployment, service, policy = _documents(KUBERNETES / "plain/ui.yaml")
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in container["env"]}
    [secret] = [each for each in _documents(KUBERNETES / "plain/secrets.yaml") if each["metadata"]["name"] == "cdc-ui"]
    assert container["args"] == ["ui"]
    assert variables["CDC_UI_HOST"] == "0.0.0.0"
    assert {Path(variables[name]).name for name in ("CDC_DSN_FILE", "CDC_UI_LOGINS_FILE")} == set(secret["stringData"])
    assert [volume["secret"]["secretName"] for volume in pod["spec"]["volumes"] if "secret" in volume] == ["cdc-ui"]
    assert list(logins(secret["stringData"]["logins"])) == ["anna"]
    assert deployment["spec"]["replicas"] == 1, "a form is good for the process that has made it"
    port = SETTINGS["ui.port"].default
    assert [each["containerPort"] for each in container["ports"]] == [port]
    assert [each["port"] for each in service["spec"]["ports"]] == [port]
    assert policy["spec"]["ingress"][0]["ports"] == [{"port": port}]
    labels = pod["metadata"]["labels"]
    assert labels == service["spec"]["selector"] == policy["spec"]["podSelector"]["matchLabels"]
    assert labels["cdc"] != "consumer", "neither Prometheus nor the consumer's policy takes it for one"


def test_each_role_of_the_secrets_is_granted_by_the_job_that_upgrades() -> None:
    [job] = _documents(KUBERNETES / "plain/upgrade.yaml")
    secrets = {each["metadata"]["name"]: each for each in _documents(KUBERNETES / "plain/secrets.yaml")}
    users = {name: re.findall(r"user=(\w+)", each["stringData"]["dsn"])[0] for name, each in secrets.items()}
    assert len(set(users.values())) == len(users)
    [grant] = job["spec"]["template"]["spec"]["containers"]
    assert grant["args"][2:] == ["--consumer", users["cdc-dsn"], "--operator", users["cdc-ui"]]


def test_the_rules_for_the_operator_are_those_of_prometheus() -> None:
    rules = [yaml.safe_load(path.read_text()) for path in sorted((DEPLOY / "prometheus").glob("*.rules.yaml"))]
    assert rules
    made = _documents(KUBERNETES / "plain/prometheusrule.yaml")
    assert [document["kind"] for document in made] == ["PrometheusRule"] * len(rules)
    assert [document["spec"] for document in made] == rules, "run deploy/kubernetes/make-prometheusrule"


@pytest.mark.parametrize("rules", ["prometheus/cdc.rules.yaml", "kubernetes/plain/prometheusrule.yaml"])
def test_the_links_of_alerts_are_made_absolute_for_where_the_documentation_is(rules: str) -> None:
    program = [str(DEPLOY / "prometheus/with-runbooks"), "https://docs.example.com/a&b/", str(DEPLOY / rules)]
    made = subprocess.run(program, capture_output=True, text=True, check=True, timeout=30).stdout
    assert made.count("runbook_url: https://docs.example.com/a&b/operations/alerts.md#") == made.count("runbook_url: ")
    assert made.replace("https://docs.example.com/a&b/", "docs/") == (DEPLOY / rules).read_text()


# --- Compose -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def test_every_file_that_compose_mounts_or_builds_from_is_there(services: dict[str, Any]) -> None:
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    built = [service["build"] for service in services.values() if "build" in service]
    files = [DEPLOY / name for name in mounted if name.startswith("./")]
    files += [DEPLOY / name / "Dockerfile" for name in built if isinstance(name, str)]
    files += [DEPLOY / name["context"] / name["dockerfile"] for name in built if isinstance(name, dict)]
    assert [path for path in files if not path.exists()] == []


def test_what_compose_publishes_is_reached_from_this_machine_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_every_service_of_compose_has_as_few_rights_as_it_can(services: dict[str, Any]) -> None:
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service.get("privileged") is None
    # Its image starts as root, and hands its directory over to the user it goes on as.
    assert {name for name, service in services.items() if "cap_add" in service} == {"db"}
    assert set(services["db"]["cap_add"]) == {"CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"}


def test_the_web_interface_of_compose_is_on_a_role_that_is_granted_and_reads_its_logins_from_a_file(
    services: dict[str, Any],
) -> None:
    ui, secrets = services["ui"], yaml.safe_load((DEPLOY / "compose.yaml").read_text())["secrets"]
    [role] = re.findall(r"user=(\w+)", ui["environment"]["CDC_DSN"])
    assert role not in {"app", "cdc"}
    assert f"--operator {role}" in services["setup"]["command"][0]
    assert f"CREATE ROLE {role} LOGIN" in (DEPLOY / "compose/database.sql").read_text()
    [name] = ui["secrets"]
    assert ui["environment"]["CDC_UI_LOGINS_FILE"] == f"/run/secrets/{name}"
    assert logins((DEPLOY / secrets[name]["file"]).read_text()) == {"operator": "for-this-machine-only"}
    assert ui["ports"] == [f"127.0.0.1:{(port := SETTINGS['ui.port'].default)}:{port}"]
    assert str(port) in ui["healthcheck"]["test"][-1]


def test_what_compose_keeps_is_on_a_volume(services: dict[str, Any]) -> None:
    """The rest of a container is read only, or in memory."""
    named = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["volumes"]
    mounted = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    assert set(named) == {name for name in mounted if not name.startswith("./")}


def test_the_second_service_of_compose_takes_the_types_that_its_subscription_is_created_with(
    services: dict[str, Any],
) -> None:
    [create] = services["setup-search"]["command"]
    assert create.startswith(f"cdc subscription create {services['search']['environment']['CDC_SUBSCRIPTION']} ")
    assert services["search"]["environment"]["CDC_HANDLERS"] == "search:router"
    router = runpy.run_path(str(DEPLOY / "compose/search.py"))["router"]
    assert set(router.entity_types) == {create.split("--type ")[1].split()[0]}


def test_every_type_that_compose_tracks_has_a_handler(services: dict[str, Any]) -> None:
    assert services["consumer"]["environment"]["CDC_HANDLERS"] == "handlers:router"
    router = runpy.run_path(str(DEPLOY / "compose/handlers.py"))["router"]
    [script] = services["setup"]["command"]
    assert set(re.findall(r"--type (\w+)", script)) == {entity_type for entity_type, _ in router.handlers}


@pytest.fixture(params=["kafka", "nats", "redis", "rabbitmq"])
def beside(request: pytest.FixtureRequest) -> Document:
    """A file that is given to Compose beside compose.yaml."""
    found: Document = yaml.safe_load((DEPLOY / f"compose/{request.param}.yaml").read_text())
    return found


def test_a_broker_s_file_names_what_is_there(beside: Document, services: dict[str, Any]) -> None:
    ours = beside["services"]
    assert set(ours) & set(services) == set(), "it changes nothing of what it is beside"
    mounted = [volume.split(":")[0] for service in ours.values() for volume in service.get("volumes", [])]
    assert [name for name in mounted if name.startswith("./") and not (DEPLOY / name).exists()] == []
    assert {name for name in mounted if not name.startswith("./")} == set(beside["volumes"])
    after = {name for service in ours.values() for name in service.get("depends_on", {})}
    assert after <= {*ours, *services}


def test_the_services_of_a_broker_s_file_have_as_few_rights_as_they_can(beside: Document) -> None:
    for name, service in beside["services"].items():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "ports" not in service
        assert "cap_add" not in service
        if "-" in name:  # not a broker's image, of which two write beside their volume
            assert service["read_only"] is True


def test_what_delivers_to_a_broker_is_scraped_and_takes_the_types_of_its_subscription(beside: Document) -> None:
    scraped = {
        name
        for job in yaml.safe_load((DEPLOY / "compose/prometheus.yaml").read_text())["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    [name] = [name for name in beside["services"] if name.startswith("to-")]
    assert name in scraped
    subscription = beside["services"][name]["environment"]["CDC_SUBSCRIPTION"]
    [create] = beside["services"][f"setup-{subscription}"]["command"]
    assert create.startswith(f"cdc subscription create {subscription} ")


def test_variables_in_the_manifests_are_settings() -> None:
    known = {setting.variable for setting in SETTINGS.values()}
    known |= {f"{setting.variable}_FILE" for setting in SETTINGS.values() if setting.secret}
    # The examples' Python is compiled where a test imports it.
    beside = {"debian-setup", "__pycache__"}
    files = [path for path in DEPLOY.rglob("*") if path.is_file() and beside.isdisjoint(path.parts)]
    named = {name for path in files for name in re.findall(r"\bCDC_[A-Z_]*[A-Z]", path.read_text("utf-8"))}
    assert named
    assert named - known == set()
