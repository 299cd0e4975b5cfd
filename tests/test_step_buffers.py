"""m4's host side: integers that cross in one copy, block tables kept as an array, graph buckets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m4_flash.block_tables import BlockTableArray
from m4_flash.decode_graphs import bucket_sizes
from m4_flash.step_buffers import StepBuffers

ARRAYS = st.lists(
    st.tuples(st.sampled_from([np.int32, np.int64]), st.lists(st.integers(0, 9), max_size=40)),
    max_size=8,
)


@settings(max_examples=50)
@given(steps=st.lists(ARRAYS, max_size=4))
def test_what_is_added_arrives(steps):
    """Whatever the sizes, also when the buffer has to grow in the middle of a step."""
    buffers = StepBuffers(64, torch.device("cpu"))
    for step in steps:
        buffers.begin()
        arrays = [np.array(values, dtype=dtype) for dtype, values in step]
        tensors = [buffers.add(array) for array in arrays]
        buffers.send()
        for array, tensor in zip(arrays, tensors, strict=True):
            assert tensor.data_ptr() % 16 == 0 or tensor.numel() == 0
            assert np.array_equal(tensor.numpy(), array)
            assert tensor.numpy().dtype == array.dtype


def test_shapes_are_kept():
    buffers = StepBuffers(1024, torch.device("cpu"))
    buffers.begin()
    table = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(buffers.add(table).numpy(), table)
    assert np.array_equal(buffers.add(table[:, 1:3]).numpy(), table[:, 1:3])


@settings(max_examples=50)
@given(data=st.data())
def test_tables_follow_lists_that_change_at_their_end(data):
    tables = BlockTableArray(max_blocks=30)
    lists: dict[int, list[int]] = {}
    for _ in range(data.draw(st.integers(1, 30))):
        row = data.draw(st.integers(0, 200))
        if row not in lists or data.draw(st.booleans()):
            lists[row] = data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=10))
            tables.write(row, lists[row])
        elif data.draw(st.booleans()) and len(lists[row]) < 30:
            lists[row].append(data.draw(st.integers(0, 99)))
            tables.update(row, lists[row])
        elif data.draw(st.booleans()):
            lists[row][-1] = data.draw(st.integers(0, 99))  # copied before it is written to
            tables.update(row, lists[row])
        else:  # some of them, in one step of decodes
            rows = data.draw(st.lists(st.sampled_from(list(lists)), unique=True))
            for each in rows:
                table = lists[each]
                table[len(table) - data.draw(st.integers(0, 1)) :] = [data.draw(st.integers(0, 99))]
            tables.update_last(np.array(rows, dtype=np.int64), [lists[each] for each in rows])
        gathered = tables.gather(np.array(list(lists)))
        assert gathered.shape[1] == max(map(len, lists.values()))
        for line, table in zip(gathered.tolist(), lists.values(), strict=True):
            assert line[: len(table)] == table


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 64, 100, 256, 1000])
def test_buckets_cover_every_batch_without_much_padding(max_num_seqs):
    sizes = bucket_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_num_seqs
    for batch in range(1, max_num_seqs + 1):
        bucket = next(size for size in sizes if size >= batch)
        assert bucket <= max(8, batch * 1.5) or bucket <= 2 * batch
        if batch > 16:
            assert bucket - batch < max(8, batch / 2)
