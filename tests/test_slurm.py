"""Tasks as jobs of a cluster: submitted once, requeued, killed. By submitit's local executor and pretended commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from time import monotonic, sleep

import psutil
import pytest

from medseg_supcon import slurm
from medseg_supcon.errors import ConfigError, RunError
from medseg_supcon.slurm import Cluster, read_cluster, run_on_cluster

LOCAL = Cluster(60, executor="local")


def writes(path, problem=""):
    """A task that adds a line to a file."""

    def task():
        with path.open("a") as stream:
            stream.write("called\n")
        return problem

    return task


def waits(started, release):
    """A task that says that it has started, and ends when it is released."""

    def task():
        from pathlib import Path
        from time import sleep

        with Path(started).open("a") as stream:
            stream.write("called\n")
        while not Path(release).exists():
            sleep(0.02)
        return ""

    return task


def wait_for(condition, seconds=60.0):
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end, "it did not happen"
        sleep(0.02)


def run(tasks, folder, at_once=None, cluster=LOCAL):
    """What `run_on_cluster` reports and says."""
    found, said = {}, []
    run_on_cluster(tasks, cluster, folder, found.__setitem__, said.append, at_once)
    return found, said


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Pretended commands of Slurm: shell scripts by their name."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "LATE", 0.0)

    def make(**scripts):
        for name, script in ({"srun": "exit 1", "scontrol": "exit 1", "sacct": "exit 1"} | scripts).items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return make


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("30", 30), ("90:30", 91), ("02:00:00", 120), ("0:0:1", 1), ("1-0", 1440), ("1-2:30", 1590), ("2-00:00:01", 2881)],
)
def test_slurms_times(time, minutes):
    assert read_cluster(f"executor=local,time={time}").minutes == minutes


def test_options_are_those_of_sbatch(commands):
    commands(sbatch="", squeue="")
    cluster = read_cluster("partition=gpu,long, --gres=gpu:1,mem_per_gpu=32G,exclusive=true,time=5")
    options = {"partition": "gpu,long", "gres": "gpu:1", "mem-per-gpu": "32G", "exclusive": "true"}
    assert cluster == Cluster(5, options, "slurm")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpu", "KEY=VALUE pairs"),
        ("=gpu,time=5", "KEY=VALUE pairs"),
        ("time=5,time=6", "time is given twice"),
        ("partition=gpu", "add time=HH:MM:SS"),
        ("time=soon", "found 'soon'"),
        ("time=0", "found '0'"),
        ("time=1:2:3:4", "found '1:2:3:4'"),
        ("time=5,nodes=2", "nodes cannot be set"),
        ("time=5,output=log", "output cannot be set"),
        ("time=5,Gres=gpu", "Gres cannot be set"),
        ("time=5,exclusive=", "exclusive has no value"),
        ("time=5,executor=pbs", "slurm or local, found 'pbs'"),
    ],
)
def test_a_wrong_option_is_a_sentence(text, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        read_cluster(text)


def test_what_is_missing_is_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"no sbatch. Use a login node.*executor=local"):
        read_cluster("time=5")
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'medseg-supcon\[slurm\]'"):
        read_cluster("executor=local,time=5")


def test_every_task_is_called_and_a_fault_of_one_is_its_own(tmp_path):
    calls = tmp_path / "calls"

    def raises():
        raise OSError("no such\ndisk")

    def refuses():
        from medseg_supcon.errors import DataError

        raise DataError("scan.nii: is empty")

    def kills():
        os.kill(os.getpid(), signal.SIGKILL)

    tasks = {
        "good": writes(calls),
        "bad": writes(calls, "it is bad"),
        "raises": raises,
        "refuses": refuses,
        "kills": kills,
    }
    found, said = run(tasks, tmp_path / "slurm", at_once=5)
    assert calls.read_text() == "called\n" * 2
    ended = found.pop("kills")
    assert found == {"good": "", "bad": "it is bad", "raises": "OSError: no such disk", "refuses": "scan.nii: is empty"}
    assert re.match(r"process \d+ was stopped; see ", ended), ended
    assert "no such\ndisk" in Path(said_log(said, "raises", tmp_path)).read_text()
    again, _ = run({"kills": writes(calls), "good": writes(calls)}, tmp_path / "slurm", at_once=2)
    assert again == {"kills": "", "good": ""} and calls.read_text() == "called\n" * 4


def said_log(said, name, folder):
    number = next(text.split()[-1] for text in said if text.startswith(f"{name}:"))
    return folder / "slurm" / f"{number}_0_log.out"


def test_one_after_another_on_one_machine(tmp_path):
    """Two tasks of which each refuses to run beside the other."""

    def alone():
        from time import sleep

        (tmp_path / "here").mkdir()
        sleep(0.3)
        (tmp_path / "here").rmdir()
        return ""

    assert run({"a": alone, "b": alone}, tmp_path / "slurm")[0] == {"a": "", "b": ""}


def test_a_job_whose_time_is_up_is_requeued(tmp_path):
    """The signal that Slurm sends before the end: the job stops, and its task is called again."""
    calls, number = tmp_path / "calls", []

    def task():
        from time import sleep

        with calls.open("a") as stream:
            stream.write("called\n")
        sleep(0 if calls.read_text().count("called") > 1 else 60)
        return ""

    def interrupt(text):
        number.append(int(text.split()[-1]))
        wait_for(lambda: calls.exists() and calls.read_text())
        for child in psutil.Process(number[0]).children():
            child.send_signal(signal.SIGUSR2)

    found = {}
    run_on_cluster({"a": task}, LOCAL, tmp_path / "slurm", found.__setitem__, interrupt)
    assert found == {"a": ""} and calls.read_text() == "called\n" * 2 and len(number) == 1


def test_jobs_go_on_without_the_program_and_are_not_submitted_again(tmp_path):
    """SIGKILL of the program while two jobs run and one waits; the next call waits for the two."""
    script = textwrap.dedent(f"""
        import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import cloudpickle, test_slurm
        cloudpickle.register_pickle_by_value(test_slurm)
        here = Path({str(tmp_path)!r})
        tasks = {{name: test_slurm.waits(here / name, here / "release") for name in "abc"}}
        test_slurm.run_on_cluster(tasks, test_slurm.LOCAL, here / "slurm", print, print, 2)
    """)
    program = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.DEVNULL)
    wait_for(lambda: (tmp_path / "a").exists() and (tmp_path / "b").exists())
    wait_for(lambda: all((tmp_path / "slurm" / f"{name}.json").exists() for name in "ab"))
    program.kill()
    program.wait()
    (tmp_path / "release").touch()
    found, said = run({name: waits(tmp_path / name, tmp_path / "release") for name in "abc"}, tmp_path / "slurm", 3)
    assert found == {"a": "", "b": "", "c": ""}
    assert [(tmp_path / name).read_text() for name in "abc"] == ["called\n"] * 3
    assert "submitted" in said[-1]


def test_what_sbatch_refuses_is_said(tmp_path, commands):
    commands(sbatch="echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1", squeue="")
    with pytest.raises(RunError, match=r"sbatch refused a: invalid partition specified: gpu\. Check --slurm"):
        run({"a": writes(tmp_path / "a")}, tmp_path / "slurm", cluster=read_cluster("partition=gpu,time=5"))


def test_what_sbatch_is_told(tmp_path, commands):
    commands(sbatch=f"cp $1 {tmp_path}/script; echo Submitted batch job 7", squeue="")
    run(
        {"a": writes(tmp_path / "a")}, tmp_path / "slurm", cluster=read_cluster("gres=gpu:1,cpus-per-task=4,time=90:30")
    )
    script = (tmp_path / "script").read_text()
    for option in ("gres=gpu:1", "cpus-per-task=4", "time=91", "requeue", "job-name=medseg-a", "signal=USR2@90"):
        assert f"#SBATCH --{option}\n" in script, option
    assert re.search(r"^srun .* --cpus-per-task=4 ", script, re.MULTILINE)


@pytest.mark.parametrize(
    ("answer", "word"), [("echo 'JobId=7 JobState=OUT_OF_MEMORY Reason=x'", "OUT_OF_MEMORY"), ("exit 1", "")]
)
def test_a_job_that_left_the_queue_without_a_word(tmp_path, commands, answer, word):
    commands(sbatch="echo Submitted batch job 7", squeue="echo '6 R None'", scontrol=answer)
    found, _ = run({"a": writes(tmp_path / "a")}, tmp_path / "slurm", cluster=read_cluster("time=5"))
    said = f"ended as {word}" if word else "ended"
    assert re.match(rf"Slurm job 7 {said}; see .*7_0_log\.out", found["a"])


def test_why_a_job_waits_is_said_and_silence_of_slurm_is_not_its_end(tmp_path, commands, monkeypatch):
    monkeypatch.setattr(slurm, "FIRST_LOOK", 0.05)
    queue = f"""
        echo x >> {tmp_path}/asked
        case $(wc -l < {tmp_path}/asked) in
            1) exit 1;;
            2) echo '7 PD (Priority)';;
            3) echo '7 PD (PartitionTimeLimit)';;
            4) exit 1;;
            5) echo '7 R None';;
        esac"""
    commands(sbatch="echo Submitted batch job 7", squeue=queue)
    found, said = run({"a": writes(tmp_path / "a")}, tmp_path / "slurm", cluster=read_cluster("time=5"))
    assert said == ["a: submitted as Slurm job 7", "a: Slurm job 7 waits in the queue: (PartitionTimeLimit)"]
    assert (tmp_path / "asked").read_text() == "x\n" * 6 and "ended" in found["a"]


def test_after_ctrl_c_a_sentence_says_how_to_cancel(tmp_path, commands, monkeypatch):
    commands(sbatch="echo Submitted batch job 7", squeue="echo '7 R None'")
    said = []

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_on_cluster({"a": writes(tmp_path / "a")}, read_cluster("time=5"), tmp_path / "slurm", print, said.append)
    assert said[-1] == "1 job may go on: run the same command again to wait for them, or scancel 7"


def test_a_path_that_slurm_would_rewrite_is_refused(tmp_path):
    with pytest.raises(RunError, match="a path with %"):
        run({}, tmp_path / "%j")
