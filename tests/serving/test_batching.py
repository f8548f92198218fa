"""Batches over concurrent requests: the same answers in the same order, fairly, and never lost."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from lesionflow.serving.batching import Batcher


class Slow:
    """Says a lesion's first pixel; remembers what it was asked, and waits where it is told to."""

    def __init__(self, parallel: int = 1, seconds: float = 0.0) -> None:
        self.parallel, self.seconds = parallel, seconds
        self.asked: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def logits(self, pixels):
        self.go.wait(10)
        self.asked.append(pixels[:, 0, 0, 0].tolist())
        time.sleep(self.seconds)
        first = pixels[:, 0, 0, 0].astype(np.float32)
        if (first == 255).any():
            raise ValueError("this one")
        return np.stack([first, first + 1], axis=1), first


def crops(*values: int):
    return np.stack([np.full((2, 2, 3), value, np.uint8) for value in values])


def until_begun(batcher: Batcher) -> None:
    """Wait until the graph has something of the first request."""
    while not batcher._jobs or not batcher._jobs[0].given:
        time.sleep(0.001)


@pytest.fixture
def running():
    made = []

    def start(graph, batch=4, **more):
        made.append(Batcher(graph, 2, batch, **more))
        return made[-1]

    yield start
    for one in made:
        one.close()


@pytest.mark.parametrize("parallel", [1, 3])
def test_every_request_gets_its_own_answers_in_its_own_order(running, parallel):
    batcher, rng = running(Slow(parallel)), np.random.default_rng(0)
    given = [rng.integers(0, 250, rng.integers(0, 30)) for _ in range(200)]
    futures = [batcher.give(crops(*values) if len(values) else np.zeros((0, 2, 2, 3), np.uint8)) for values in given]
    for values, future in zip(given, futures, strict=True):
        fold_logits, logit = future.result(10)
        assert logit.tolist() == values.tolist() and (fold_logits[:, 1] == logit + 1).all()
    assert batcher.waiting == 0


def test_waiting_requests_share_a_batch_and_an_idle_graph_waits_for_nobody(running):
    graph = Slow()
    batcher = running(graph, batch=8)
    assert batcher.give(crops(7)).result(5)[1] == 7 and graph.asked == [[7]]
    graph.go.clear()
    first = batcher.give(crops(1))
    until_begun(batcher)
    others = [batcher.give(crops(n)) for n in range(10, 16)]
    graph.go.set()
    assert [one.result(5)[1][0] for one in (first, *others)] == [1, *range(10, 16)]
    assert graph.asked == [[7], [1], list(range(10, 16))]


def test_a_large_visit_does_not_hold_up_a_single_picture(running):
    graph = Slow(seconds=0.01)
    batcher = running(graph, batch=4)
    large = batcher.give(crops(*range(100)))
    started = time.perf_counter()
    assert batcher.give(crops(200)).result(5)[1] == 200
    assert time.perf_counter() - started < 0.15, "of 25 batches it waited for few"
    assert large.result(5)[1].tolist() == list(range(100))


def test_what_fails_takes_only_its_batch_with_it(running):
    batcher = running(Slow(2), batch=2)
    bad, good = batcher.give(crops(*[255] * 9)), batcher.give(crops(1, 2, 3))
    with pytest.raises(ValueError, match="this one"):
        bad.result(5)
    outcome = good.exception(5)
    assert outcome is None or str(outcome) == "this one", "it may have shared a batch"
    assert batcher.give(crops(4)).result(5)[1] == 4 and batcher.waiting == 0


def test_how_long_one_would_wait_is_known(running):
    graph = Slow(seconds=0.02)
    batcher = running(graph, batch=4)
    assert batcher.wait(1) == 0, "nothing is known, nothing waits"
    batcher.give(crops(1, 2, 3, 4)).result(5)
    graph.go.clear()
    jobs = [batcher.give(crops(*range(40))) for _ in range(3)]
    alone, visit = batcher.wait(1), batcher.wait(40)
    assert alone == pytest.approx(3 * 4 * batcher.seconds) and visit == pytest.approx(120 * batcher.seconds)
    graph.go.set()
    for job in jobs:
        job.result(10)
    assert batcher.wait(40) == 0


def test_closing_finishes_what_was_given(running):
    batcher = Batcher(Slow(seconds=0.01), 2, 4)
    futures = [batcher.give(crops(n)) for n in range(20)]
    batcher.close()
    assert [one.result(0)[1][0] for one in futures] == list(range(20))
    with pytest.raises(RuntimeError, match="closed"):
        batcher.give(crops(1))


def test_who_leaves_costs_no_work_and_takes_nobody_along(running):
    graph = Slow()
    batcher = running(graph, batch=2)
    graph.go.clear()
    begun = batcher.give(crops(1))
    until_begun(batcher)
    waiting = batcher.give(crops(*range(2, 40)))
    assert begun.cancel() and waiting.cancel()
    last = batcher.give(crops(200))
    graph.go.set()
    assert last.result(5)[1] == 200 and batcher.waiting == 0
    assert graph.asked == [[1], [200]], "what nobody waits for isn't worked on"


def test_a_free_graph_is_used_by_whoever_comes_and_a_busy_one_holds_nobody_up(running):
    graph, threads = Slow(), []
    logits = graph.logits
    graph.logits = lambda pixels: (threads.append(threading.get_ident()), logits(pixels))[1]
    batcher = running(graph)
    assert batcher.give(crops(3), here=True).result(0)[1] == 3 and threads == [threading.get_ident()]
    graph.go.clear()
    first = batcher.give(crops(1))
    until_begun(batcher)
    second = batcher.give(crops(2), here=True)
    assert not second.done()
    graph.go.set()
    assert [one.result(5)[1][0] for one in (first, second)] == [1, 2] and threading.get_ident() not in threads[1:]


@pytest.mark.parametrize(("seconds", "calls"), [(0.003, [4, 4]), (0.05, [2, 2, 2, 2])])
def test_a_request_uses_all_calls_that_may_run_and_none_is_long(running, seconds, calls):
    graph = Slow(parallel=2, seconds=seconds)
    batcher = running(graph, batch=8, least=2)
    batcher.give(crops(1), here=True).result(0)
    assert batcher.give(crops(*range(8)), here=True).result(5)[1].tolist() == list(range(8))
    assert [len(one) for one in graph.asked[1:]] == calls


def test_a_small_request_is_answered_as_a_whole_in_its_turn(running):
    graph = Slow()
    batcher = running(graph, batch=8)
    graph.go.clear()
    begun = batcher.give(crops(1))
    until_begun(batcher)
    given = [batcher.give(crops(*range(n, n + 4))) for n in range(10, 50, 10)]
    graph.go.set()
    for one in (begun, *given):
        one.result(5)
    assert [[value // 10 for value in call] for call in graph.asked[1:]] == [[1] * 4 + [2] * 4, [3] * 4 + [4] * 4]


def test_the_next_batch_runs_while_the_last_one_s_asker_is_told(running):
    graph = Slow()
    batcher = running(graph, batch=1)
    graph.go.clear()
    futures, told = [batcher.give(crops(n)) for n in range(3)], threading.Event()
    futures[0].add_done_callback(lambda done: told.wait(10))
    graph.go.set()
    deadline = time.monotonic() + 5
    while len(graph.asked) < 3:
        assert time.monotonic() < deadline, "the graph waits for the telling"
        time.sleep(0.001)
    told.set()
    assert [one.result(5)[1][0] for one in futures] == [0, 1, 2]


def test_what_the_graph_has_done_by_now_is_nothing_to_wait_for(running):
    graph = Slow(seconds=0.2)
    batcher = running(graph, batch=4)
    batcher.give(crops(1, 2, 3, 4)).result(5)
    batcher.give(crops(*range(4)))
    before = batcher.soon(4)
    time.sleep(0.1)
    assert 0 < batcher.soon(4) < before <= 4 * batcher.seconds
    assert batcher.soon(1) == 0, "one lesion gets its turn with the next batch"
