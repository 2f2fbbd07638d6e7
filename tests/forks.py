"""Processes that train together on this machine, forked from a program that has imported all it needs."""

import os
import socket
import sys
from collections.abc import Callable

import torch


def free_port() -> int:
    """Return a port of this machine that nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def fork(work: Callable[[], object], rank: int, count: int, port: int) -> int:
    """Do work in a process that is one of several, as `torchrun` would tell it; return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if count > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work()
        if count > 1:
            torch.distributed.destroy_process_group()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def run_together(work: Callable[[], object], count: int) -> int:
    """Do work in so many processes at once; return 0, or the code of one that failed."""
    port = free_port()
    children = [fork(work, rank, count, port) for rank in range(count)]
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) for child in children)
