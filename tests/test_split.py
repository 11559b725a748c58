from itertools import combinations, pairwise

import pytest
import torch

from gpipe.partitioning.split import split_evenly


def brute_force(sizes, stages):
    """The smallest largest stage over all divisions."""
    cells = len(sizes)
    divisions = (pairwise((0, *cuts, cells)) for cuts in combinations(range(1, cells), stages - 1))
    return min(max(sum(sizes[a:b]) for a, b in division) for division in divisions)


@pytest.mark.parametrize("cells", [1, 2, 5, 9])
def test_the_largest_stage_is_as_small_as_can_be(cells):
    generator = torch.Generator().manual_seed(cells)
    for _ in range(30):
        sizes = torch.randint(0, 20, (cells,), generator=generator).tolist()
        for stages in range(1, cells + 1):
            balance = split_evenly(sizes, stages)
            ends = [sum(balance[:k]) for k in range(stages + 1)]
            assert len(balance) == stages
            assert sum(balance) == cells
            assert min(balance) >= 1
            assert max(sum(sizes[a:b]) for a, b in pairwise(ends)) == brute_force(sizes, stages)


@pytest.mark.parametrize("stages", [0, 4])
def test_more_stages_than_cells_are_refused(stages):
    with pytest.raises(ValueError, match=f"3 cells can be divided into 1 to 3 stages, got {stages}"):
        split_evenly([1, 2, 3], stages)
