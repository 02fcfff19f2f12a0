"""The files of examples/deploy: valid for the systems that read them, and in step with our commands, paths and metrics."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.dockerfile import DOCKERFILE, context_files, read
from dsi_actors.cli.main import _parser
from dsi_actors.config import Config
from dsi_actors.keys import Keyring, load_worker_key, new_keys
from dsi_actors.serving.metrics import Metrics
from dsi_actors.worker import _parser as _worker_parser

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples/deploy"
KUBERNETES_VERSION = "1.33"


def manifests(name: str) -> dict[tuple[str, str], Any]:
    """Kind and name → manifest."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text(encoding="utf-8")))
    found = {(each["kind"], each["metadata"]["name"]): each for each in documents}
    assert len(found) == len(documents)
    return found


def pods(name: str) -> dict[str, Any]:
    """Pod specs by the name of their controller."""
    return {
        who: each["spec"]["template"]["spec"]
        for (_, who), each in manifests(name).items()
        if "template" in each["spec"]
    }


FILES = ("one-node.yaml", "many-nodes.yaml")


@pytest.mark.parametrize("name", FILES)
def test_manifests_are_valid(name: str) -> None:
    for manifest in manifests(name).values():
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


@pytest.mark.parametrize("name", FILES)
def test_selectors_claims_and_ports_lead_somewhere(name: str) -> None:
    found = manifests(name)
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in found.values() if "template" in each["spec"]]
    for (kind, who), each in found.items():
        if kind == "Service":
            assert each["spec"]["selector"] in labels
        elif kind in ("Deployment", "StatefulSet"):
            template = each["spec"]["template"]
            assert each["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
            claims = [volume["metadata"]["name"] for volume in each["spec"].get("volumeClaimTemplates", ())]
            volumes = [volume["name"] for volume in template["spec"].get("volumes", ())] + claims
            for volume in template["spec"].get("volumes", ()):
                if claim := volume.get("persistentVolumeClaim"):
                    assert ("PersistentVolumeClaim", claim["claimName"]) in found
            [container] = template["spec"]["containers"]
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes), who
    ports = {port["name"] for pod in pods(name).values() for port in pod["containers"][0].get("ports", ())}
    targets = {port["targetPort"] for each in found.values() for port in each["spec"].get("ports", ())}
    assert targets <= ports


@pytest.mark.parametrize("name", FILES)
def test_containers_can_do_nothing_but_write_their_cache(name: str) -> None:
    for pod in pods(name).values():
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True, "allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]},
        }  # fmt: skip
        writable = [mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")]
        assert writable == [read_only_image()["VOLUME"]]


def read_only_image() -> Mapping[str, str]:
    return {each.word: each.text for each in read(DOCKERFILE.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", FILES)
def test_commands_can_be_typed(name: str) -> None:
    for pod in pods(name).values():
        words = pod["containers"][0]["args"]
        if words[0] == "dsi-actors":
            _parser().parse_args(words[1:])
        else:
            assert words[:3] == ["python", "-m", "dsi_actors.worker"]
            _worker_parser().parse_args(words[3:])


@pytest.mark.parametrize("name", FILES)
def test_services_are_probed_and_scraped_where_they_answer(name: str) -> None:
    routes = {"/health", "/ready", "/metrics"}
    for manifest in manifests(name).values():
        template = manifest["spec"].get("template")
        if template is None or "ports" not in template["spec"]["containers"][0]:
            continue
        [container] = template["spec"]["containers"]
        numbers = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        notes = template["metadata"]["annotations"]
        assert notes["prometheus.io/port"] == numbers["http"]
        probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
        assert {probe["port"] for probe in probes} == {"http"}
        assert {probe["path"] for probe in probes} | {notes["prometheus.io/path"]} == routes
        drain_s = _parser().parse_args(container["args"][1:]).drain_s
        assert template["spec"]["terminationGracePeriodSeconds"] > drain_s + 10


def test_workers_reach_an_orchestrator_that_is_not_ready_yet() -> None:
    """It becomes ready when a target server is there."""
    found = manifests("many-nodes.yaml")
    arguments = _worker_parser().parse_args(pods("many-nodes.yaml")["dsi-worker"]["containers"][0]["args"][3:])
    host, port = arguments.connect.removeprefix("tcp://").split(":")
    service = found["Service", host]["spec"]
    assert service["publishNotReadyAddresses"]
    assert [each["port"] for each in service["ports"]] == [int(port)]
    listens = _parser().parse_args(pods("many-nodes.yaml")["dsi-orchestrator"]["containers"][0]["args"][1:]).listen
    assert listens.endswith(f":{port}")
    assert "publishNotReadyAddresses" not in found["Service", "dsi-actors"]["spec"], "clients wait until it is ready"


def test_the_keys_of_the_manifest_are_those_of_its_commands(tmp_path: Path) -> None:
    text = (DEPLOY / "kubernetes/many-nodes.yaml").read_text(encoding="utf-8")
    [names] = re.findall(r"dsi-actors keys new keys (.*)", text)
    new_keys(tmp_path, names.split())
    worker = manifests("many-nodes.yaml")["StatefulSet", "dsi-worker"]
    assert names.split() == [f"dsi-worker-{number}" for number in range(worker["spec"]["replicas"])]
    created = dict(re.findall(r"kubectl create (?:secret generic|configmap) (\S+) --from-\w+=(\S+)", text))
    [orchestrator] = pods("many-nodes.yaml")["dsi-orchestrator"]["containers"]
    # What the two mounts put together must be a directory of keys.
    mounts = {mount["name"]: mount for mount in orchestrator["volumeMounts"]}
    keys = tmp_path / "mounted"
    keys.mkdir()
    volumes = {volume["name"]: volume for volume in pods("many-nodes.yaml")["dsi-orchestrator"]["volumes"]}
    source = tmp_path.parent / created[volumes["key"]["secret"]["secretName"]].replace("keys", tmp_path.name, 1)
    assert source.name == mounts["key"]["subPath"]
    where = _parser().parse_args(orchestrator["args"][1:]).keys
    for name, path in (("key", source), ("allowed", tmp_path / "allowed")):
        (keys / Path(mounts[name]["mountPath"]).relative_to(where)).symlink_to(path)
    assert created[volumes["allowed"]["configMap"]["name"]] == "keys/allowed"
    assert sorted(Keyring(keys).allowed.values()) == names.split()
    [mount] = [
        each for each in worker["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] if each["name"] == "keys"
    ]
    for name in names.split():
        load_worker_key(tmp_path / "workers" / mount["subPathExpr"].replace("$(POD_NAME)", name))


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads((DEPLOY / "grafana/dsi-actors.json").read_text(encoding="utf-8"))
    metrics = Metrics("m", workers=lambda role: 0, waiting=lambda: 0).text().decode()
    families = {name: kind for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", metrics, re.MULTILINE)}
    known = {*families}
    known |= {f"{name}_bucket" for name, kind in families.items() if kind == "histogram"}
    asked: set[str] = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = set(re.findall(r"\bdsi_\w+", target["expr"]))
            assert names <= known, panel["title"]
            assert names, panel["title"]
            asked |= names
    shown = {name.removesuffix("_bucket") for name in asked}
    assert shown == {name for name in families if name.startswith("dsi_")}, "each metric of ours has a panel"
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_the_unit_is_one(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here")
    unit = (DEPLOY / "systemd/dsi-actors.service").read_text(encoding="utf-8")
    [command] = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, *words = command.removesuffix(" $DSI_OPTIONS").split()
    assert program.endswith("/dsi-actors")
    drain_s = _parser().parse_args(words).drain_s
    [stop_s] = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(stop_s) > drain_s + 10
    path = tmp_path / "dsi-actors.service"
    path.write_text(unit.replace(program, "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_is_built_from_what_a_clone_has() -> None:
    """The build context, and what the build reads of it, are there; nothing but the cache is written when it runs."""
    files = {path.as_posix() for path in context_files()}
    assert {"pyproject.toml", "constraints.txt", "README.md", "dsi_actors/worker.py"} <= files
    assert "workers/dsi_workers/main.py" in files
    assert not any(path.startswith(("tests/", "docs/")) for path in files)
    image = read_only_image()
    [variables] = [each.text for each in read(DOCKERFILE.read_text(encoding="utf-8")) if "DSI_CACHE" in each.text]
    values = dict(pair.split("=", 1) for pair in variables.split())
    assert all(value.startswith(image["VOLUME"]) for value in values.values())
    assert set(values) == {"HOME", "TMPDIR", "DSI_CACHE", "HF_HOME", "TRITON_CACHE_DIR"}
    user, _, group = image["USER"].partition(":")
    assert user.isdecimal()
    assert group.isdecimal()
    assert int(user) > 0
    command = json.loads(image["CMD"])
    assert command[0] == "dsi-actors"
    _parser().parse_args(command[1:])
    assert Config().listen is None
