from hypothesis import given
from hypothesis import strategies as st

from lorafit.packing import batches, held_out, in_order

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=300)


@given(lengths, st.integers(1, 40), st.integers(0, 5))
def test_every_row_once_and_no_batch_too_large(sizes, size, epoch):
    made = batches(sizes, size, seed=1, epoch=epoch)
    assert sorted(row for batch in made for row in batch) == list(range(len(sizes)))
    assert all(0 < len(batch) <= size for batch in made)
    assert made == batches(sizes, size, seed=1, epoch=epoch)


def test_epochs_and_seeds_differ():
    sizes = list(range(1, 200))
    assert len({str(batches(sizes, 8, seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}) == 4


def test_rows_of_like_length_go_together():
    sizes = [n % 97 + 1 for n in range(2000)]
    padded = sum(max(sizes[r] for r in b) * len(b) for b in batches(sizes, 8, 0, 1))
    assert padded < 1.05 * sum(sizes)


@given(lengths, st.integers(1, 20))
def test_evaluation_reads_every_row_once_by_length(sizes, size):
    flat = [row for batch in in_order(sizes, size) for row in batch]
    assert sorted(flat) == list(range(len(sizes))) and [sizes[r] for r in flat] == sorted(sizes)


@given(st.integers(2, 10_000), st.floats(0.001, 0.5), st.integers(0, 9))
def test_the_held_out_share(count, share, seed):
    out = held_out(count, share, seed)
    assert 1 <= len(out) <= 200 and len(set(out)) == len(out) and out == held_out(count, share, seed)
    assert all(0 <= n < count for n in out)
