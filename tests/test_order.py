"""The order of the data: every image once an epoch, and the same stream from wherever one starts."""

import pytest
import torch

from spikegen.order import batch_indices, flip_mask


@pytest.mark.parametrize("num_images", [1, 7, 64])
def test_every_epoch_is_a_permutation(num_images: int) -> None:
    stream = batch_indices(3, 0, 5 * num_images, num_images).view(5, num_images)
    assert torch.equal(stream.sort(1).values, torch.arange(num_images).expand(5, -1))
    assert num_images == 1 or len(stream.unique(dim=0)) == 5


@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_batches_from_anywhere_are_slices_of_one_stream(batch_size: int) -> None:
    whole, flips = batch_indices(0, 0, 200, 7), flip_mask(0, 0, 200)
    for start in (0, 1, 6, 7, 50, 170):
        assert torch.equal(batch_indices(0, start, batch_size, 7), whole[start : start + batch_size])
        assert torch.equal(flip_mask(0, start, batch_size), flips[start : start + batch_size])


def test_order_depends_on_the_seed_and_flips_are_fair() -> None:
    assert not torch.equal(batch_indices(0, 0, 50, 50), batch_indices(1, 0, 50, 50))
    assert batch_indices(0, 0, 5, 50).tolist() == [0, 43, 38, 21, 2]  # for good: runs are resumed elsewhere
    assert 0.45 < flip_mask(0, 10, 4000).float().mean() < 0.55
