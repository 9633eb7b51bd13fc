"""The alert rules and the dashboard, as far as they can be judged without a server."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import yaml

from cdc.observability.registries import LABEL
from tests.prometheus.fix_queries import (
    DASHBOARDS,
    ROOT,
    RULES,
    alerts,
    asked_for,
    dashboard,
    grouped_by,
    needed,
    panel_queries,
    panels,
    rules,
)
from tests.reference.metrics import everything

OF_PROMETHEUS = {"job", "instance", "alertname", "alertstate", LABEL}
OF_POSTGRES_EXPORTER: Mapping[str, set[str]] = {
    "pg_replication_slots_active": {"slot_name"},
    "pg_replication_slots_pg_wal_lsn_diff": {"slot_name"},
}


@cache
def known() -> Mapping[str, set[str]]:
    """Sample name -> labels, of all that a consumer can show."""
    samples = [sample for family in everything() for sample in family.samples]
    return {**OF_POSTGRES_EXPORTER, **{sample.name: set(sample.labels) for sample in samples}}


def _unknown(expression: str) -> list[str]:
    faults = []
    available = set(OF_PROMETHEUS)
    for name, labels in asked_for(expression):
        if name not in known():
            faults.append(f"no metric {name}")
        available |= known().get(name, set())
        faults += [f"{name} has no label {label}" for label in labels - known().get(name, set()) - OF_PROMETHEUS]
    return faults + [f"nothing has the label {label}" for label in grouped_by(expression) - available]


def test_the_rules_ask_for_metrics_and_labels_that_exist() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    faults = {}
    for rule in rules():
        expression = rule["expr"]
        for name in recorded:
            expression = expression.replace(name, "cdc_changes_handled_total")
        faults[rule.get("alert") or rule["record"]] = _unknown(expression)
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize("reader", DASHBOARDS)
def test_the_dashboard_asks_for_metrics_and_labels_that_exist(reader: str) -> None:
    faults = {where: _unknown(expression) for where, expression in panel_queries(reader)}
    assert {where: found for where, found in faults.items() if found} == {}


def test_a_metric_or_label_that_does_not_exist_is_found() -> None:
    assert _unknown("sum by (jop) (rate(cdc_wakeups_total[5m]))") == ["nothing has the label jop"]
    assert _unknown('cdc_wakeups_total{sauce="wal"}') == ["cdc_wakeups_total has no label sauce"]
    assert _unknown("max(cdc_wakeups)") == ["no metric cdc_wakeups"]


def test_each_alert_has_a_severity_two_sentences_and_its_entry_in_the_runbook() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in {"warning", "critical"}
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}, alert["alert"]
        assert alert["annotations"]["runbook_url"] == f"docs/operations/alerts.md#{alert['alert'].lower()}"
        assert alert["for"], "one bad reading wakes nobody"
    runbook = (ROOT / "docs/operations/alerts.md").read_text("utf-8")
    entries = re.findall(r"^## (Cdc\w+)$", runbook, re.MULTILINE)
    assert sorted(entries) == sorted({alert["alert"] for alert in alerts()})


def test_promtool_finds_no_fault_in_the_rules() -> None:
    command = [needed("promtool"), "check", "rules", "--lint=all", "--lint-fatal", str(RULES)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_when_it_should_and_is_silent_when_not() -> None:
    files = [Path(__file__).parent / name for name in ("cdc.rules_test.yaml", "cdc.rules_days_test.yaml")]
    done = subprocess.run([needed("promtool"), "test", "rules", *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    fired = {
        case["alertname"]
        for file in files
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
        if case["exp_alerts"]
    }
    assert fired == {alert["alert"] for alert in alerts()}


# --- the dashboards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "variables"), [("operators", ["job", "instance", "slot"]), ("handlers", ["job", "handler", "type"])]
)
def test_the_dashboard_can_be_imported_and_provisioned(reader: str, variables: list[str]) -> None:
    board = dashboard(reader)
    assert (board["id"], board["uid"], board["schemaVersion"]) == (None, DASHBOARDS[reader], 39)
    assert {entry["name"] for entry in board["__inputs"]} == {"DS_PROMETHEUS"}
    assert [variable["name"] for variable in board["templating"]["list"]] == ["DS_PROMETHEUS", *variables]
    kinds = {entry["id"] for entry in board["__requires"] if entry["type"] == "panel"}
    assert kinds == {panel["type"] for panel in panels(reader)}
    for panel in panels(reader):
        assert {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])} == {
            "${DS_PROMETHEUS}"
        }


@pytest.mark.parametrize("reader", DASHBOARDS)
def test_each_panel_says_what_it_shows_and_in_which_unit(reader: str) -> None:
    for panel in panels(reader):
        assert panel["title"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references
        assert len(set(references)) == len(references), panel["title"]


@pytest.mark.parametrize("reader", DASHBOARDS)
def test_no_panel_lies_on_another_or_outside(reader: str) -> None:
    everything = dashboard(reader)["panels"]
    numbers = [panel["id"] for panel in everything]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


def test_provisioning_names_a_data_source_and_the_folder_of_the_dashboards() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((provisioning / "dashboards/cdc.yaml").read_text())["providers"]
    assert (source["type"], provider["type"]) == ("prometheus", "file")
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in (ROOT / "deploy/compose.yaml").read_text()
