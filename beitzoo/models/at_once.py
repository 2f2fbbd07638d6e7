"""Calls at the same time, each on a thread of its own that has its share of PyTorch's threads.

PyTorch computes one operator after the other, each with all its threads, which wait for each other behind every
operator. Parts of a batch that are computed beside each other need not.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")

# By process, as a forked one has none of its parent's threads; then by calls at once and threads of each.
_executors: dict[tuple[int, int, int], ThreadPoolExecutor] = {}
_locks: dict[int, threading.Lock] = {}


def at_once(calls: Sequence[Callable[[], R]], threads: int) -> list[R]:
    """Return what calls return, without gradients, having run them at the same time.

    Inference mode is the caller's; autocast and dispatch modes do not reach the calls. A call must not come here again.

    Args:
        calls: What each thread does.
        threads: That PyTorch computes each of them with.
    """
    key = os.getpid(), len(calls), threads
    executor = _executors.get(key)
    if executor is None:
        executor = ThreadPoolExecutor(len(calls), "beitzoo", initializer=_start, initargs=(threads,))
        executor = _executors.setdefault(key, executor)
    inference = torch.is_inference_mode_enabled()
    futures = [executor.submit(_run, call, inference) for call in calls]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()  # what has not begun when another one failed


def _start(threads: int) -> None:
    """Let this thread compute with so many.

    PyTorch makes that the number of all threads to come too, which a thread that ends at once takes back.
    """
    with _locks.setdefault(os.getpid(), threading.Lock()):
        of_others = torch.get_num_threads()  # asked first: a thread that never asked forgets what it was told
        torch.set_num_threads(threads)
        restoring = threading.Thread(target=torch.set_num_threads, args=(of_others,))
        restoring.start()
        restoring.join()


def _run(call: Callable[[], R], inference: bool) -> R:
    with torch.inference_mode(inference), torch.no_grad():
        return call()
