from hypothesis import given
from hypothesis import strategies as st

from lorafit.data.batching import MOST_PADDING, batches, held_out, in_epoch, in_order

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=300)


@given(lengths, st.integers(1, 40))
def test_every_row_once_and_no_batch_too_large(sizes, size):
    made = batches(sizes, size, seed=1)
    assert sorted(row for batch in made for part in batch for row in part) == list(range(len(sizes)))
    assert all(sum(map(len, batch)) == size for batch in made[:-1])
    assert made == batches(sizes, size, seed=1)


@given(lengths, st.integers(1, 40))
def test_little_of_what_is_processed_is_padding(sizes, size):
    parts = in_order(sizes, size)
    processed = sum(max(sizes[row] for row in part) * len(part) for part in parts)
    assert processed - sum(sizes) <= MOST_PADDING * processed


def test_a_batch_is_split_only_where_it_must_be():
    even = [100] * 64
    assert all(len(batch) == 1 for batch in batches(even, 8, seed=0))
    odd = [10, 10, 50, 50]
    assert [sorted(map(len, batch)) for batch in batches(odd, 4, seed=0)] == [[2, 2]]


def test_epochs_and_seeds_differ():
    sizes = list(range(1, 200))
    assert len({str(in_epoch(50, seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4
    assert sorted(in_epoch(50, 1, 1)) == list(range(50))
    assert batches([5] * 40, 8, seed=1) != batches([5] * 40, 8, seed=2)
    assert batches(sizes, 8, seed=1) == batches(sizes, 8, seed=1)


@given(lengths, st.integers(1, 20))
def test_evaluation_reads_every_row_once_by_length(sizes, size):
    flat = [row for part in in_order(sizes, size) for row in part]
    assert sorted(flat) == list(range(len(sizes))) and [sizes[r] for r in flat] == sorted(sizes)


@given(st.integers(2, 10_000), st.floats(0.001, 0.5), st.integers(0, 9))
def test_the_held_out_share(count, share, seed):
    out = held_out(count, share, seed)
    assert 1 <= len(out) <= 200 and len(set(out)) == len(out) and out == held_out(count, share, seed)
    assert all(0 <= n < count for n in out)
