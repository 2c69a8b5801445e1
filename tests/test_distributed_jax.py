"""SA attention over a JAX mesh.

The tests of eight devices are in ``eight_jax_devices.py``, which needs a process of its own; ``jax_processes.py`` is
run as two processes, of which one fails.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax", exc_type=ImportError)

FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def test_on_eight_host_devices() -> None:
    file = Path(__file__).with_name("eight_jax_devices.py")
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = {**os.environ, "XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= 30, run.stdout
    assert "skipped" not in run.stdout


def among_two_processes(scenario: str, *, heartbeat: int = 100, flags: str = "") -> tuple[int, str, str]:
    """Exit status, output and errors of the process that does not fail."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    file = Path(__file__).with_name("jax_processes.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(file), scenario, str(rank), address, str(heartbeat)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        output, errors = processes[0].communicate(timeout=300)
        return processes[0].returncode, output, errors
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("scenario", "flags", "what"),
    [
        ("killed", "", "Connection (closed|reset) by peer"),
        ("hanging", "--xla_cpu_collective_timeout_seconds=20", "Timed out waiting"),
    ],
)
def test_a_process_that_fails_is_an_error_in_bounded_time(scenario: str, flags: str, what: str) -> None:
    status, output, errors = among_two_processes(scenario, flags=flags)
    assert status == 0, errors
    result = json.loads(output.splitlines()[-1])
    assert result["error"] is not None
    assert re.search(f"Gloo collective permute failed: .*{what}", result["error"])
    assert result["seconds"] < 60


def test_a_process_without_heartbeats_ends_the_other() -> None:
    status, output, errors = among_two_processes("stopped", heartbeat=20)
    assert status == -signal.SIGABRT, output + errors
    assert "stopped sending heartbeats" in errors
