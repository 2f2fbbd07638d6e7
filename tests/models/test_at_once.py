"""Calls at the same time run on threads of their own, with their share of PyTorch's, and in the caller's mode."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from beitzoo.models.at_once import at_once


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def _in_a_new_thread() -> int:
    """Return with how many threads PyTorch computes in a thread that comes later."""
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return found[0]


def test_each_call_has_a_thread_with_its_share_and_nobody_else_is_changed() -> None:
    barrier = threading.Barrier(2, timeout=60)  # both at the same time, or never

    def call() -> tuple[int, int]:
        barrier.wait()
        return threading.get_ident(), torch.get_num_threads()

    (first, threads), (second, others) = at_once([call, call], 2)
    assert len({first, second, threading.get_ident()}) == 3
    assert (threads, others) == (2, 2)
    assert (torch.get_num_threads(), _in_a_new_thread()) == (4, 4)


def test_results_are_in_order_and_in_the_mode_of_the_caller() -> None:
    calls = [lambda n=n: (n, torch.is_grad_enabled(), torch.is_inference_mode_enabled()) for n in range(3)]
    assert at_once(calls, 1) == [(n, False, False) for n in range(3)]
    with torch.inference_mode():
        assert at_once(calls, 1) == [(n, False, True) for n in range(3)]
        assert at_once([lambda: torch.ones(1).is_inference()], 1) == [True]


def test_an_error_of_a_call_is_the_callers() -> None:
    def fail() -> None:
        raise KeyError("second")

    with pytest.raises(KeyError, match="second"):
        at_once([lambda: None, fail], 1)
    assert at_once([lambda: 1, lambda: 2], 1) == [1, 2]


def test_many_callers_take_turns() -> None:
    found: dict[int, list[int]] = {}

    def caller(n: int) -> None:
        for _ in range(20):
            found[n] = at_once([lambda: n, lambda: n + 100], 1)

    callers = [threading.Thread(target=caller, args=(n,)) for n in range(6)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(60)
    assert found == {n: [n, n + 100] for n in range(6)}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    calls = [threading.get_ident, threading.get_ident]
    at_once(calls, 1)  # the parent's threads do not reach the child
    child = os.fork()
    if child == 0:
        os._exit(0 if len(at_once(calls, 1)) == 2 else 1)
    waiting = threading.Timer(60, os.kill, (child, 9))
    waiting.start()
    _, status = os.waitpid(child, 0)
    waiting.cancel()
    assert status == 0
