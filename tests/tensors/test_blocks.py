"""Where shards are in their matrix: as torch.chunk cuts it, by rows, by columns, and by FSDP2 after TP."""

from itertools import product

import pytest
import torch
from fusedamp.tensors.blocks import _block

ROWS, COLUMNS, STRIDED, WHOLE = (0, 1), (1, 1), (0, 2), (-1, 1)  # dimension and split factor of a placement
SHAPES = [(8, 12), (5, 7), (1, 6), (9, 4), (0, 3), (3, 0), (2, 9)]


def chunk(tensor, ranks, rank, dim):
    """The part that torch.chunk gives to ``rank``; the last ones may get nothing."""
    parts = tensor.chunk(ranks, dim)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


def shard(matrix, placements, sizes, place):
    """The shard at ``place``. STRIDED: the next dimension has cut the rows first, by tensor parallelism."""
    if placements == (STRIDED, ROWS):
        return chunk(chunk(matrix, sizes[1], place[1], 0), sizes[0], place[0], 0)
    for (dim, _), ranks, rank in zip(placements, sizes, place, strict=True):
        matrix = matrix if dim < 0 else chunk(matrix, ranks, rank, dim)
    return matrix


CASES = [
    ((ROWS,), (4,)),
    ((COLUMNS,), (3,)),
    ((ROWS, COLUMNS), (2, 3)),
    ((COLUMNS, ROWS), (3, 2)),
    ((ROWS, ROWS), (2, 2)),
    ((STRIDED, ROWS), (2, 2)),
    ((WHOLE, ROWS), (2, 4)),
    ((COLUMNS, WHOLE), (2, 2)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("placements", "sizes"), CASES, ids=str)
def test_shards_make_the_matrix(placements, sizes, shape):
    """Guards uneven and empty shards, and the order in which they arrive."""
    matrix = torch.arange(shape[0] * shape[1]).view(shape)
    along = tuple(dim for dim, placement in enumerate(placements) if placement != WHOLE)
    block = _block(shape, sizes, placements, along, (0,) * len(sizes))
    assert block.shape == shape
    assert [*block.parts] == [place[::-1] for place in product(*(range(sizes[dim]) for dim in along[::-1]))]
    shards = []
    for place in block.parts:
        everywhere = dict.fromkeys(range(len(sizes)), 0) | dict(zip(along, place, strict=True))
        shards.append(shard(matrix, placements, sizes, tuple(everywhere.values())))
        assert block.shape_at(place) == tuple(shards[-1].shape)
    assert torch.equal(block.joined([part.reshape(-1) for part in shards]), matrix)
    for cut, part in zip(block.cut(matrix), shards, strict=True):
        assert torch.equal(cut, part.reshape(-1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("placements", [(ROWS, COLUMNS), (STRIDED, ROWS)], ids=str)
def test_a_block_is_the_shard_of_the_other_dimension(placements, shape):
    """Guards orthogonalization per shard: what ranks along the first dimension hold together."""
    matrix = torch.arange(shape[0] * shape[1]).view(shape)
    for rank in range(2):
        block = _block(shape, (2, 2), placements, (0,), (1, rank))
        expected = chunk(matrix, 2, rank, 0 if placements[1] == ROWS else 1)
        shards = [shard(matrix, placements, (2, 2), (first, rank)).reshape(-1) for first in range(2)]
        assert block.mine == (1,)
        assert block.shape == tuple(expected.shape)
        assert torch.equal(block.joined(shards), expected)
