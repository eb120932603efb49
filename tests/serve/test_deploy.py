"""The files of deploy/ and docs/serve.md say what is so of `fastbert serve`.

Options, ports, paths, limits of time, names of metrics and fields of the log; and a service of
another user may read what training wrote.
"""

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # transformers brings it

import fastbert
from fastbert.cli import main
from fastbert.commands import serve
from fastbert.commands.options import Commands, Parser, given
from fastbert.errors import UserError
from fastbert.hf.load import load_model, load_tokenizer
from fastbert.hf.save import save_model
from fastbert.serve.config import ServeConfig
from fastbert.serve.gate import ALWAYS
from fastbert.serve.server import Server
from fastbert.settings import settings

from .served import saved, serving

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
HOSTS = {"download.pytorch.org"}
PAGE = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")


def config_of(words: list[str]) -> ServeConfig:
    """What a command line asks for, as the command itself reads it."""
    assert Path(words[0]).name == "fastbert"
    parser = Parser(prog="fastbert", allow_abbrev=False)
    serve.add(Commands(parser, "commands", "COMMAND"))
    args, unknown = parser.parse_known_args(words[1:])
    assert not unknown
    config = given(args)
    assert isinstance(config, ServeConfig)
    return config


def seconds_to_end(config: ServeConfig) -> float:
    """From SIGTERM until it gives up what is not answered."""
    patience = Server(None, config).config.timeout_graceful_shutdown  # type: ignore[arg-type]
    assert patience and patience > config.timeout
    return config.shutdown_delay + patience


def unit() -> dict[str, list[str]]:
    """The values of each key of the unit of systemd."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "fastbert.service").read_text().splitlines():
        if line and line[0] not in "#[":
            key, equals, value = line.partition("=")
            assert equals
            found.setdefault(key, []).append(value)
    return found


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, what it says) of each; continued lines as one."""
    text = (DEPLOY / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.M).replace("\\\n", " ").splitlines()
    found = [line.partition(" ") for line in lines if line.strip()]
    assert all(word.isupper() for word, _, _ in found)
    return [(word, rest.strip()) for word, _, rest in found]


def said(instruction: str) -> list[str]:
    return [rest for word, rest in dockerfile() if word == instruction]


def entrypoint() -> list[str]:
    (words,) = said("ENTRYPOINT")
    found = json.loads(words)
    assert isinstance(found, list)
    return found


def health_check() -> list[str]:
    (text,) = said("HEALTHCHECK")
    found = json.loads(text.partition(" CMD ")[2])
    assert isinstance(found, list)
    return found


def manifests() -> dict[str, Any]:
    text = (DEPLOY / "kubernetes.yaml").read_text()
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


# systemd


def test_the_unit_starts_what_there_is_and_waits_long_enough() -> None:
    found = unit()
    (line,) = found["ExecStart"]
    config = config_of(shlex.split(line))
    assert config.host == ServeConfig(model="m").host == "127.0.0.1"
    assert found["IPAddressAllow"] == ["localhost"]
    name, _, source = found["LoadCredential"][0].partition(":")
    assert config.token_file == f"%d/{name}" and source.startswith("/etc/")
    assert float(found["TimeoutStopSec"][0]) > seconds_to_end(config)
    assert found["KillSignal"] == ["SIGTERM"]
    assert found["CacheDirectory"] == ["fastbert"] and "HOME=%C/fastbert" in found["Environment"]
    assert "MemoryDenyWriteExecute" not in found
    for key in ("DynamicUser", "NoNewPrivileges"):
        assert found[key] == ["yes"]


# Docker


def test_the_image_installs_and_starts_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [re.findall(r'"\.\[(\w+)\]"', line) for line in said("RUN")]
    assert [name for names in extras for name in names] == ["serve"]
    assert "serve" in project["optional-dependencies"]
    for line in said("COPY"):
        if not line.startswith("--from"):
            assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    least = tuple(map(int, project["requires-python"].removeprefix(">=").split(".")))
    images = said("FROM")
    assert len(images) == 2
    for image in images:
        assert tuple(map(int, re.findall(r"python:(\d+)\.(\d+)-slim", image)[0])) >= least
    config = config_of(entrypoint())
    assert config.host == "0.0.0.0" and said("EXPOSE") == [str(config.port)]
    assert said("USER")[0].partition(":")[0] not in ("0", "root")


def test_its_health_check_tells_ready_from_draining(tmp_path: Path) -> None:
    config = config_of(entrypoint())
    command = health_check()
    (path,) = re.findall(r"'GET', '(/\w+)'", command[-1])
    assert path == "/ready" and f"'127.0.0.1', {config.port}," in command[-1]

    def status(port: int) -> int:
        code = command[-1].replace(f" {config.port},", f" {port},")
        return subprocess.run([sys.executable, *command[1:-1], code], timeout=60).returncode

    with serving(saved(tmp_path, "embed"), ["a token of sixteen"]) as running:
        assert status(running.address[1]) == 0
        running.service.draining = True
        assert status(running.address[1]) == 1


# Kubernetes


def test_the_manifest_fits_the_image_and_the_service(tmp_path: Path) -> None:
    found = manifests()
    assert set(found) == {"Service", "Deployment"}
    template = found["Deployment"]["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    (container,) = pod["containers"]
    config = config_of([*entrypoint(), *container["args"]])
    assert found["Service"]["spec"]["selector"] == labels
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    ports = {one["name"]: one["containerPort"] for one in container["ports"]}
    assert ports == {"http": config.port}
    assert [one["targetPort"] for one in found["Service"]["spec"]["ports"]] == ["http"]
    assert pod["terminationGracePeriodSeconds"] > seconds_to_end(config)
    probes = {kind: container[f"{kind}Probe"] for kind in ("startup", "readiness", "liveness")}
    paths = {kind: one["httpGet"]["path"] for kind, one in probes.items()}
    assert paths == {"startup": "/ready", "readiness": "/ready", "liveness": "/health"}
    assert {*paths.values()} <= {*ALWAYS}  # neither a token nor room is needed
    assert all(one["httpGet"]["port"] == "http" for one in probes.values())
    assert config.shutdown_delay > probes["readiness"]["periodSeconds"]
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert {config.model, str(Path(config.token_file).parent), "/tmp"} == set(mounts)
    assert set(mounts.values()) == {one["name"] for one in pod["volumes"]}
    assert said("ENV")[-1].count("HOME=/tmp ") == 1  # what is written goes where it may
    user = int(said("USER")[0].partition(":")[0])
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == user
    told = template["metadata"]["annotations"]
    assert told["prometheus.io/port"] == str(config.port)
    with serving(saved(tmp_path, "embed")) as running:
        status, text, _ = running.ask(told["prometheus.io/path"])
        assert status == 200 and "fastbert_requests" in text


@pytest.mark.parametrize("path", sorted(DEPLOY.iterdir()), ids=lambda path: path.name)
def test_no_other_host_is_named(path: Path) -> None:
    assert set(re.findall(r"https?://([\w.-]+)", path.read_text())) <= HOSTS


# docs/serve.md


def test_the_page_names_every_option_and_no_other() -> None:
    flags = {one.flag for one in settings(ServeConfig)}
    named = set(re.findall(r"`(--[a-z-]+)", PAGE)) | {
        word
        for line in re.findall(r"fastbert serve (.*)", PAGE)
        for word in re.findall(r"--[a-z-]+", line)
    }
    negative = {f"--no-{one.flag[2:]}" for one in settings(ServeConfig) if one.type is bool}
    assert named - negative <= flags
    positive = {one.replace("--no-", "--") for one in named}
    assert flags <= positive


def test_the_page_names_every_metric_status_and_field_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (line,) = re.findall(r'^\{"time": .*', PAGE, re.M)
    with (
        caplog.at_level(logging.INFO, "fastbert.serve"),
        serving(saved(tmp_path, "classify"), access_log=True) as running,
    ):
        running.right("/predict", {"inputs": "the cat"})
        (told,) = [one.told for one in caplog.records if one.message == "request"]
        assert list(json.loads(line)) == ["time", "level", "event", *told]
        names = set(re.findall(r"^# TYPE (\w+) ", running.ask("/metrics")[1], re.M))
        paths = running.ask("/openapi.json")[1]["paths"].values()
    statuses = {status for path in paths for one in path.values() for status in one["responses"]}
    rows = re.findall(r"^\| ([345]\d\d(?:, [345]\d\d)*) \|", PAGE, re.M)
    assert statuses - {"200"} <= {status for row in rows for status in row.split(", ")}
    told_names = {re.sub("_total$", "", one) for one in names if not one.endswith("_created")}
    named = set(re.findall(r"`(fastbert_\w+)`", PAGE))
    assert named == {one for one in told_names if one.startswith("fastbert_")}


# Models


@pytest.fixture
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_other_users_may_read_what_is_written(tmp_path: Path, usual_umask: None) -> None:
    where = Path(saved(tmp_path, "embed"))
    model, tokenizer = load_model(where), load_tokenizer(where)
    save_model(tmp_path / "tuned", model, tokenizer, {})
    fastbert.save_pretrained(fastbert.load_pretrained(where), tmp_path / "own")
    command = ["export", "--model", str(where), "--to", "safetensors", "--out"]
    assert main([*command, str(tmp_path / "one.safetensors")]) == 0
    written = [*tmp_path.glob("own/*"), *tmp_path.glob("tuned/*"), tmp_path / "one.safetensors"]
    assert sum(path.suffix == ".safetensors" for path in written) == 3
    for path in written:
        assert path.stat().st_mode & 0o777 == 0o644, path


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Path(saved(tmp_path, "embed"))
    (where / "model.safetensors").write_bytes(b"")
    ask = os.access
    name = "model.safetensors"
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != name and ask(path, mode)
    )
    with pytest.raises(UserError, match=r"model\.safetensors: this user may not read it"):
        load_model(where)
