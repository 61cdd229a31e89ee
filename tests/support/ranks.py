"""Processes that are ranks of one gloo group, for the tests: free port, bounded time, loopback only."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from processes import forks

LIMIT = 300  # seconds, after which a collective that waits for a rank raises


def _rank(
    rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], results: Any
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT))
        value = io.BytesIO()
        torch.save(function(rank, size, *arguments), value)  # bytes: tensors of a process that ends are gone
        results.put((rank, value.getvalue(), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(rank, size, *arguments), a function of a module, returns on each of `size` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = forks()
    results = context.Queue()
    processes = [
        context.Process(target=_rank, args=(rank, size, port, function, arguments, results), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    result: dict[int, Any] = {}
    try:
        for _ in range(size):
            rank, value, error = results.get(timeout=LIMIT)
            assert error is None, f"rank {rank}:\n{error}"
            result[rank] = torch.load(io.BytesIO(value), weights_only=False)
        for process in processes:
            process.join(LIMIT)
    finally:
        for process in processes:
            process.kill()
    return [result[rank] for rank in range(size)]
