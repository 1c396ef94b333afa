"""Processes that train together on this machine, over MLX's ring backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    said: str


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody uses."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def launch(code: str, *arguments: object, ranks: int = 2, folder: Path) -> list[Ended]:
    """Run Python code once per rank, with the tests in its path; returns how each ended.

    They are waited for one by one, so a rank that waits for ever for another one is an error here.
    """
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**environment, **({"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} if ranks > 1 else {})},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        return [
            Ended(process.returncode, said) for process in processes for said in [process.communicate(timeout=120)[1]]
        ]
    finally:
        for process in processes:
            process.kill()
