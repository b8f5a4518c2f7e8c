"""Several processes on this machine share a run, one is killed, and the run is resumed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import jax
import pytest

import adv2_jax
from adv2_jax import hosts
from adv2_jax.cli.entry import main
from adv2_jax.hosts import ENDED, Processes
from adv2_jax.runs import store
from adv2_jax.runs.store import Part, Store

ATTACK = [
    "--limit",
    "12",
    "--batch-size",
    "1",
    "--steps",
    "2",
    "--interpreter",
    "cam",
    "--snapshots",
    "1",
    "--quiet",
]


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def start():
    """(words, number of processes) -> that many processes of `adv2 attack`; none is left behind."""
    started = []

    def start(words, count):
        # as conftest.py sets them in this process
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
            "PYTHONPATH": str(Path(adv2_jax.__file__).parents[1]),
        }
        words = [*words, "--distributed", f"--coordinator=localhost:{free_port()}"]
        command = [sys.executable, "-m", "adv2_jax", "attack", *words, f"--processes={count}"]
        processes = [
            subprocess.Popen(
                [*command, f"--process={i}"], env=environment, stderr=subprocess.PIPE, text=True
            )
            for i in range(count)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def alone(brightness, tmp_path_factory):
    """The words of a run, and the folder of its results by one process."""
    out = tmp_path_factory.mktemp("alone")
    words = [*brightness, *ATTACK]
    assert main(["attack", *words, f"--out={out}"]) == 0
    return words, out


def summary(out):
    """The summary of a run, without what may differ: where, when and how long."""
    found = json.loads((out / "summary.json").read_text())
    del found["environment"], found["config"]["command"], found["config"]["out"]
    return found | {"rows": [row | {"seconds": None} for row in found["rows"]]}


@pytest.mark.slow
def test_two_processes_make_the_results_of_one(alone, start, tmp_path):
    words, single = alone
    ends = [
        (process.communicate(timeout=120)[1], process.returncode)
        for process in start([*words, f"--out={tmp_path}"], 2)
    ]
    assert ends == [("", 0)] * 2
    assert (tmp_path / "results.npz").read_bytes() == (single / "results.npz").read_bytes()
    assert summary(tmp_path) == summary(single)
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(single))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    places = [(line["attack"], line["batch"]) for line in lines]
    assert places == [(attack, i) for attack in ("noise", "pgd", "adv2") for i in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_with_one_that_is_killed(alone, start, tmp_path, killed):
    words, single = alone
    processes = start([*words, f"--out={tmp_path}"], 2)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("batches/*/*.npz")):
        assert time.monotonic() < until
        time.sleep(0.02)
    processes[killed].send_signal(signal.SIGKILL)
    other = processes[1 - killed]
    assert other.communicate(timeout=20)[1] == f"adv2: {ENDED}\n"
    assert other.returncode == 2
    assert not (tmp_path / "results.npz").exists()
    assert main(["attack", *words, f"--out={tmp_path}", "--resume"]) == 0
    assert (tmp_path / "results.npz").read_bytes() == (single / "results.npz").read_bytes()


def test_process_0_lets_the_others_begin_and_exit():
    pairs = [socket.socketpair() for _ in range(2)]
    first = Processes(0, 3, [a for a, _ in pairs])
    others = [Processes(i, 3, [b]) for i, (_, b) in enumerate(pairs, 1)]
    passed = []

    def take_part(one):
        one.begin()
        passed.append(one.index)
        try:
            one.finish()
        except SystemExit as end:
            passed.append(end.code)

    threads = [Thread(target=take_part, args=(one,)) for one in others]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    assert passed == []
    first.begin()
    until = time.monotonic() + 10
    while len(passed) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(passed) == [1, 2]
    first.finish()
    for thread in threads:
        thread.join(10)
    assert passed[2:] == [None, None]  # which is exit code 0
    for a, b in pairs:
        b.close()  # process 0 hears of it, and knows that the run is over
        a.close()


def test_a_stranger_is_not_taken_for_a_process():
    port, links = free_port(), []
    until = time.monotonic() + 10
    thread = Thread(target=lambda: links.extend(hosts._accept(port, {b"adv2 1 of 2"}, until)))
    thread.start()
    stranger = hosts._reach("localhost", port, b"adv2 1 of 3", until)
    assert stranger.recv(1) == b""  # closed
    with stranger, hosts._reach("localhost", port, b"adv2 1 of 2", until) as link:
        thread.join(10)
        with links[0]:
            assert links[0].getpeername() == link.getsockname()


WRONG = {
    "need --distributed": "--process 1",
    "go together": "--distributed --coordinator localhost:1",
    "'nowhere' is not HOST:PORT": "--distributed --coordinator nowhere --processes 2 --process 0",
    "the last is 1": "--distributed --coordinator localhost:1 --processes 2 --process 2",
    "JAX detects no other hosts": "--distributed",
    "process 1 of 2 does not meet": "--distributed --coordinator localhost:{port} --processes 2 --process 1",
    "process 0 of 2 does not meet": "--distributed --coordinator :{port} --processes 2 --process 0",
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_refused_in_one_line(message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hosts, "PATIENCE", 0.3)
    jax.devices()  # JAX detects nothing once it has begun
    words = WRONG[message].format(port=free_port()).replace(" :", " localhost:").split()
    assert main(["attack", f"--out={tmp_path / 'out'}", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_not_shared_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "LATE", 0)
    one = Store(tmp_path, {}, [Part("cam", "pgd", 0)], leads=False)
    with pytest.raises(ValueError, match="is not shared by all processes"):
        one.join()
    Store(tmp_path, {"seed": 1}, []).announce()
    with pytest.raises(ValueError, match="with other settings"):
        one.join()
