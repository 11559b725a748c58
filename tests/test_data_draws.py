"""What is drawn by (seed, step): rows, held-out rows, distortions of images."""

import math

import pytest
import torch

from gpipe.training.data_augment import Augment, augment
from gpipe.training.data_draws import batch_rows, generator, hold_out


def test_epochs_are_permutations_laid_end_to_end():
    rows = torch.cat([batch_rows(3, step, 4, 10) for step in range(15)])  # 60 rows: six epochs
    for epoch in rows.split(10):
        assert sorted(epoch.tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:20].tolist()
    assert not torch.equal(batch_rows(4, 0, 4, 10), batch_rows(3, 0, 4, 10))


def test_a_batch_may_be_the_whole_data_set():
    assert sorted(batch_rows(0, 7, 5, 5).tolist()) == list(range(5))


@pytest.mark.parametrize("rows", [0, 11])
def test_batch_size_outside_the_data_is_refused(rows):
    with pytest.raises(ValueError, match=f"batch size from 1 to 10.*got {rows}: choose"):
        batch_rows(0, 0, rows, 10)


def test_negative_step_and_seed_are_refused():
    with pytest.raises(ValueError, match="step of at least 0, got -1"):
        batch_rows(0, -1, 2, 10)
    with pytest.raises(ValueError, match="seed of at least 0, got -1"):
        generator(-1, 0, 0)


def test_generators_differ_by_every_number():
    draws = {
        (s, p, i): int(torch.randint(2**62, (), generator=generator(s, p, i)))
        for s in (0, 1)
        for p in (0, 1)
        for i in (0, 1)
    }
    assert len(set(draws.values())) == 8


def test_hold_out_keeps_the_mix_of_labels():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 21)[torch.randperm(101, generator=generator(0, 0, 0))]
    kept, held = hold_out(labels, 0.2)
    assert sorted(kept.tolist() + held.tolist()) == list(range(101))
    assert len(held) == math.ceil(101 / 5)
    counts = torch.bincount(labels[held])
    assert all(abs(int(count) - total / 5) <= 1 for count, total in zip(counts, (50, 30, 21), strict=True))
    assert torch.equal(hold_out(labels, 0.2)[1], held)


@pytest.mark.parametrize(
    ("rows", "fraction", "message"), [(1, 0.2, "at least 2 rows"), (9, 0.7, "at most 0.5, got 0.7")]
)
def test_hold_out_refuses(rows, fraction, message):
    with pytest.raises(ValueError, match=message):
        hold_out(torch.zeros(rows, dtype=torch.int64), fraction)


# Augmentation


def test_no_augmentation_is_the_identity():
    images = torch.rand(3, 2, 5, 7)
    torch.testing.assert_close(augment(images, Augment(), generator(0, 0, 0)), images)


def test_flip_mirrors_about_half_of_the_images():
    images = torch.rand(64, 1, 4, 4)
    result = augment(images, Augment(flip=True), generator(0, 0, 0))
    flipped = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(result, images, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(result, images, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 16 < sum(flipped) < 48


def disc(places):
    """A (1, 1, 65, 65) image that is 1 around each of the places, as (down, right) from the middle."""
    y, x = torch.arange(65)[:, None] - 32, torch.arange(65) - 32
    return sum(((y - down) ** 2 + (x - right) ** 2 <= 9).float() for down, right in places)[None, None]


def centre(image):
    """Where the mass of (H, W) images lies, as (down, right) from the middle."""
    weights = image / image.sum(dim=(-2, -1), keepdim=True)
    place = torch.arange(image.shape[-1]) - (image.shape[-1] - 1) / 2
    return (weights.sum(-1) * place).sum(-1), (weights.sum(-2) * place).sum(-1)


@pytest.mark.parametrize(
    ("settings", "measure", "limit"),
    [
        (Augment(degrees=15.0), lambda down, right: torch.atan2(down, right) * 180 / math.pi, 15.0),
        (Augment(scale=0.15), lambda down, right: torch.hypot(down, right) / 20 - 1, 0.15),
        (Augment(shift=6.0), lambda down, right: right - 20, 6.0),
        (Augment(shift=6.0), lambda down, right: down, 6.0),
    ],
    ids=["degrees", "scale", "right", "down"],
)
def test_augmentation_goes_as_far_as_it_says(settings, measure, limit):
    images = disc([(0, 20)]).expand(200, -1, -1, -1)
    found = measure(*centre(augment(images, settings, generator(1, 0, 0))[:, 0]))
    assert found.abs().max() <= limit * 1.02
    assert found.max() > 0.9 * limit
    assert found.min() < -0.9 * limit


def test_rotation_turns_and_does_not_shear():
    def turned(place):  # by the same five angles, whatever the place
        return centre(augment(disc([place]).expand(5, -1, -1, -1), Augment(degrees=40.0), generator(0, 0, 0))[:, 0])

    down, right = turned((20, 0))
    other_down, other_right = turned((0, 20))
    torch.testing.assert_close(down, other_right, atol=0.2, rtol=0)
    torch.testing.assert_close(right, -other_down, atol=0.2, rtol=0)


def test_augmentation_does_not_depend_on_threads():
    images, before = torch.rand(64, 3, 16, 16), torch.get_num_threads()
    settings = Augment(degrees=15.0, scale=0.15, shift=1.0)
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(augment(images, settings, generator(0, 0, 0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_nearest_interpolation_makes_no_new_values():
    images = disc([(7.0, 7.0)])
    settings = Augment(degrees=15.0, scale=0.15, shift=1.0)
    nearest = augment(images, settings.model_copy(update={"interpolation": "nearest"}), generator(0, 0, 0))
    values = set(images.unique().tolist())
    assert set(nearest.unique().tolist()) <= values | {0.0}
    assert not set(augment(images, settings, generator(0, 0, 0)).unique().tolist()) <= values | {0.0}
