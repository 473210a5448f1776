"""Tasks as jobs of a real Slurm, which these tests start on this machine: one node, its own ports and folder.

Requeued jobs are in test_slurm.py, by submitit's local executor: Slurm itself waits two minutes before it starts one again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from test_slurm import run, wait_for, waits, writes

from medseg_supcon import slurm
from medseg_supcon.slurm import read_cluster, run_on_cluster

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scontrol", "scancel")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores}
PartitionName=cpu Nodes={host} Default=YES
"""


@pytest.fixture(scope="module")
def node():
    """A Slurm of one node; its commands find it by SLURM_CONF."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        pytest.skip(f"{missing[0]} is not installed: apt-get install slurmctld slurmd slurm-client munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    folder = Path(tempfile.mkdtemp(prefix="medseg-slurm-"))
    folder.chmod(0o755)  # munged asks for that
    with socket.socket() as one, socket.socket() as two:
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (one, two)]
    host, cores = socket.gethostname().partition(".")[0], os.cpu_count()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=ports, host=host, cores=cores))
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o400)
    files = {
        "key-file": "key",
        "socket": "munge",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "seed",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setattr(slurm, "FIRST_LOOK", 0.2)
        patch.setattr(slurm, "LATE", 0.5)
        patch.setattr(slurm, "LONGEST_PAUSE", 0.4)
        try:
            for command in (["munged", *(f"--{k}={folder / v}" for k, v in files.items())], ["slurmctld"], ["slurmd"]):
                subprocess.run(command, check=True, timeout=30)
            wait_for(lambda: "idle" in slurm._ask("sinfo", "--noheader", "--format=%t") or "", 30)
            yield
        finally:
            for name in ("slurmd", "slurmctld", "munged"):
                with suppress(OSError, ValueError):
                    os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)
            shutil.rmtree(folder, ignore_errors=True)


pytestmark = pytest.mark.usefixtures("node")


def jobs(text="partition=cpu,cpus-per-task=1,time=10"):
    return read_cluster(text)


def test_jobs_run_and_one_fails(tmp_path):
    calls = tmp_path / "calls"
    tasks = {"good": writes(calls), "bad": writes(calls, "it is bad")}
    found, said = run(tasks, tmp_path / "slurm", cluster=jobs())
    assert found == {"good": "", "bad": "it is bad"} and calls.read_text() == "called\n" * 2
    assert all(re.search(r"submitted as Slurm job \d+$", text) for text in said)


def test_a_job_that_is_killed_is_named(tmp_path):
    tasks, found, signals = {"a": waits(tmp_path / "a", tmp_path / "never"), "b": writes(tmp_path / "b")}, {}, []

    def kill(text):
        if number := re.match("a: submitted as Slurm job (.*)", text):
            wait_for((tmp_path / "a").exists)
            signals.append(subprocess.run(["scancel", "--signal=KILL", "--full", number[1]], check=True))

    run_on_cluster(tasks, jobs(), tmp_path / "slurm", found.__setitem__, kill)
    assert len(signals) == 1 and found.pop("b") == ""
    assert re.match(r"Slurm job \d+ ended as (FAILED|CANCELLED); see .*_0_log\.out", found["a"])


def test_a_job_of_an_earlier_call_is_waited_for(tmp_path):
    """The first call ends with Ctrl-C while its job runs."""

    class Stop(Exception):
        pass

    def say(text):
        wait_for((tmp_path / "a").exists)
        raise Stop

    tasks = {"a": waits(tmp_path / "a", tmp_path / "release")}
    with pytest.raises(Stop):
        run_on_cluster(tasks, jobs(), tmp_path / "slurm", print, say)
    (tmp_path / "release").touch()
    found, said = run(tasks, tmp_path / "slurm", cluster=jobs())
    assert found == {"a": ""} and (tmp_path / "a").read_text() == "called\n"
    assert re.fullmatch(r"a: waiting for Slurm job \d+, which an earlier call submitted\.", said[0]) or not said


def test_an_option_that_slurm_refuses_is_said(tmp_path):
    with pytest.raises(slurm.RunError, match=r"sbatch refused a: .*invalid partition specified: gpu.* Check --slurm"):
        run({"a": writes(tmp_path / "a")}, tmp_path / "slurm", cluster=jobs("partition=gpu,time=5"))
