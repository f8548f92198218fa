"""One global order: the same for any number of processes, from any step on."""

from __future__ import annotations

import numpy as np
import pytest

from lesionflow.data.sampler import Sampler, StepSampler
from lesionflow.recipe import Sampling


def make(kind: str = "balanced", n: int = 500, malignant: int = 37, batch: int = 32, **options: int) -> Sampler:
    rows = np.random.default_rng(0).permutation(n * 2)[:n]
    targets = np.zeros(n, np.int8)
    targets[:malignant] = 1
    settings = {"epochs": 6, "seed": 4, **options}
    return Sampler(rows, targets, Sampling(kind, 3.0), batch_size=batch, **settings)


@pytest.mark.parametrize("kind", ["balanced", "shuffle"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_ranks_together_show_every_drawn_lesion_once(kind: str, world: int) -> None:
    sampler = make(kind)
    for epoch in range(3):
        steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
        shown = [r for step in steps for rank in range(world) for r in sampler.batch(step, rank, world).rows.tolist()]
        assert sorted(shown) == sorted(sampler.order(epoch).tolist())
        assert len(set(shown)) == len(shown)


def test_two_processes_make_the_batches_of_one_with_the_same_randoms() -> None:
    sampler, other = make(), make()
    for step in (0, 7, sampler.steps - 1):
        whole = sampler.batch(step)
        halves = [other.batch(step, rank, 2) for rank in range(2)]
        for rank, half in enumerate(halves):
            assert np.array_equal(half.rows, whole.rows[rank::2])
            assert np.array_equal(half.randoms, whole.randoms[rank::2])
        assert len(halves[0]) + len(halves[1]) == len(whole)


def test_changing_a_batch_changes_no_order() -> None:
    sampler = make()
    for world in (1, 2):
        first = sampler.batch(3, 0, world)
        before = first.rows.copy(), first.randoms.copy()
        first.rows[:], first.randoms[:] = 0, 0
        again = sampler.batch(3, 0, world)
        assert np.array_equal(again.rows, before[0]) and np.array_equal(again.randoms, before[1])


def test_balanced_epochs_hold_all_malignant_and_walk_through_the_negatives() -> None:
    sampler = make(n=400, malignant=20, batch=16, epochs=12)
    malignant = set(sampler._malignant.tolist())
    negatives: list[int] = []
    for epoch in range(12):
        order = sampler.order(epoch).tolist()
        assert malignant <= set(order)
        negatives += [row for row in order if row not in malignant]
    assert len(sampler.order(0)) == 80
    assert len(set(negatives[:360])) == 360, "no negative comes twice before all came once"
    assert set(negatives) == set(sampler._others.tolist())


def test_the_order_depends_on_seed_and_epoch_but_not_on_row_order() -> None:
    a = make()
    assert not np.array_equal(a.order(0), a.order(1))
    assert not np.array_equal(a.order(0), make(seed=5).order(0))
    rows = np.arange(50)
    targets = (rows < 9).astype(np.int8)
    back = Sampler(rows[::-1].copy(), targets[::-1].copy(), Sampling(), epochs=1, batch_size=8, seed=1)
    assert np.array_equal(Sampler(rows, targets, Sampling(), epochs=1, batch_size=8, seed=1).order(0), back.order(0))


@pytest.mark.parametrize(("n", "batch"), [(33, 32), (100, 32), (31, 32), (64, 32), (5, 4)])
def test_no_step_is_much_smaller_than_the_others(n: int, batch: int) -> None:
    sampler = make("shuffle", n=n, malignant=2, batch=batch, epochs=1)
    sizes = [len(sampler.batch(step)) for step in range(sampler.steps)]
    assert sum(sizes) == n
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    assert sizes == [sampler.batch_size(step) for step in range(sampler.steps)]


def test_a_resumed_sampler_goes_on_where_it_was() -> None:
    sampler = make()
    whole = [draws.rows.tolist() for draws in StepSampler(sampler, 0, 1, 2)]
    rest = StepSampler(sampler, 11, 1, 2)
    assert len(rest) == sampler.steps - 11
    assert [draws.rows.tolist() for draws in rest] == whole[11:]
