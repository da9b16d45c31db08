"""Each augmentation does what it says to a whole sample: all its steps and channels, and its label."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import v2

from spikegen.augment import AugmentSpec, augment, mixed, resized, rolled, warped
from spikegen.images import to_model, to_uint8
from spikegen.spec import parse
from tests.inputs import mistake

ALL = AugmentSpec(scale=0.3, crop=2, flip=True, roll=3, rotate=20, shear=15, cutout=4, mixup=0.5)


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 50, shape, generator=generator).to(dtype)
    return images, torch.eye(5, dtype=dtype)[torch.arange(shape[0]) % 5]


@pytest.mark.parametrize("shape", [(6, 3, 12, 12), (6, 4, 2, 12, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_off_is_the_identity_and_on_keeps_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    images, labels = batch(*shape, dtype=dtype)
    same, same_labels = augment(AugmentSpec(), images, labels)
    assert torch.equal(same, images)
    assert torch.equal(same_labels, labels)
    other, other_labels = augment(ALL, images, labels)
    assert (other.shape, other.dtype, other_labels.shape, other_labels.dtype) == (shape, dtype, labels.shape, dtype)
    assert not torch.equal(other, images)
    assert torch.allclose(other_labels.sum(1), torch.ones(6, dtype=dtype))


@pytest.mark.parametrize(
    "spec", [ALL, *(AugmentSpec(**{k: getattr(ALL, k)}) for k in AugmentSpec.model_fields if k != "policy")], ids=str
)
def test_all_steps_and_channels_move_alike(spec: AugmentSpec) -> None:
    images, labels = batch(8, 1, 1, 12, 12)
    torch.manual_seed(1)
    moved, _ = augment(spec, images.expand(8, 5, 2, 12, 12), labels)
    assert torch.equal(moved, moved[:, :1, :1].expand_as(moved))
    torch.manual_seed(1)
    assert torch.equal(augment(spec, images[:, 0], labels)[0], moved[:, 0, :1])


def test_the_seed_decides() -> None:
    images, labels = batch(8, 4, 2, 12, 12)
    draws = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        draws.append(augment(ALL, images, labels))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert not torch.equal(draws[0][0], draws[2][0])


def test_flip_flips_some() -> None:
    images, labels = batch(64, 2, 2, 6, 6)
    flipped, _ = augment(AugmentSpec(flip=True), images, labels)
    changed = [not torch.equal(a, b) for a, b in zip(flipped, images, strict=True)]
    assert 10 < sum(changed) < 54
    assert all(torch.equal(f, i.flip(-1) if c else i) for f, i, c in zip(flipped, images, changed, strict=True))


def test_crop_is_cut_from_an_empty_frame() -> None:
    images, labels = batch(64, 2, 9, 12)
    cut, _ = augment(AugmentSpec(crop=2), images, labels, empty=-3.0)
    found = set()
    for image, other in zip(images, cut, strict=True):
        framed = F.pad(image, (2, 2, 2, 2), value=-3.0)
        fits = [(a, b) for a in range(5) for b in range(5) if torch.equal(other, framed[:, a : a + 9, b : b + 12])]
        assert len(fits) == 1
        found.add(fits[0])
    assert {a for a, _ in found} == {b for _, b in found} == set(range(5))


@pytest.mark.parametrize("least", [0.08, 0.5, 1.0])
def test_scale_keeps_at_least_that_share_of_the_area(least: float) -> None:
    """Shown on ramps: what of them is left says how large the part was, and the middle where it lay."""
    ramp = torch.arange(32.0)
    ramps = torch.stack([ramp.expand(32, 32), ramp[:, None].expand(32, 32)]).expand(64, 2, 32, 32)
    seen, _ = augment(AugmentSpec(scale=least), ramps, torch.eye(64))
    across, down = seen[:, 0].mean(1), seen[:, 1].mean(2)
    shares = (across[:, 24] - across[:, 8]) / 16 * (down[:, 24] - down[:, 8]) / 16
    assert (shares > least * 0.8 - 0.02).all()  # sides are whole pixels
    assert (shares < 1.01).all()
    assert shares.std() > 0.05 or least == 1
    assert seen.shape == ramps.shape
    assert across[:, 16].std() > 0.5 or least == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_part_is_resized_as_torchvision_does(dtype: torch.dtype) -> None:
    """Away from the part's rim, where torchvision knows nothing of the pixels outside."""
    images, _ = batch(5, 3, 20, 24, dtype=dtype)
    parts = torch.tensor([[0, 0, 20, 24], [3, 5, 10, 12], [7, 2, 9, 20], [1, 8, 18, 9], [6, 6, 5, 6]], dtype=dtype)
    seen = resized(images, parts)
    assert torch.allclose(seen[0], images[0])
    for image, part, other in zip(images, parts.int().tolist(), seen, strict=True):
        right = v2.functional.resized_crop(image, *part, [20, 24], antialias=True)
        rim = (slice(None), slice(3, -3), slice(3, -3))
        assert torch.allclose(other[rim], right[rim], atol=1e-3)


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_policy_is_autoaugments_on_each_image(policy: str, channels: int) -> None:
    images = to_model(torch.randint(0, 256, (16, channels, 12, 12), dtype=torch.uint8))
    torch.manual_seed(3)
    changed, labels = augment(AugmentSpec(policy=policy), images, torch.eye(16))
    torch.manual_seed(3)
    each = v2.AutoAugment(v2.AutoAugmentPolicy(policy))
    assert torch.equal(to_uint8(changed), torch.stack([each(image) for image in to_uint8(images)]))
    assert torch.equal(labels, torch.eye(16))
    assert sum(not torch.equal(a, b) for a, b in zip(images, changed, strict=True)) > 3
    events, names = batch(4, 5, 2, 12, 12)
    mistake(
        lambda: augment(AugmentSpec(policy=policy), events, names), "augment.policy is for grey or RGB", "10 channels"
    )


def test_roll_is_torch_roll_by_at_most_that_much() -> None:
    images, labels = batch(64, 2, 9, 12)
    shift = torch.randint(-20, 20, (2, 64))
    one_by_one = [torch.roll(i, s.tolist(), (1, 2)) for i, s in zip(images, shift.T, strict=True)]
    assert torch.equal(rolled(images, shift), torch.stack(one_by_one))
    moved, _ = augment(AugmentSpec(roll=2), images, labels)
    found = set()
    for image, other in zip(images, moved, strict=True):
        fits = [(a, b) for a in range(-2, 3) for b in range(-2, 3) if torch.equal(other, image.roll((a, b), (1, 2)))]
        assert len(fits) == 1
        found.add(fits[0])
    assert {a for a, _ in found} == {b for _, b in found} == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize("side", [8, 9])
def test_right_angles_turn_exactly(side: int) -> None:
    images, _ = batch(4, 3, side, side)
    turned = warped(images, torch.tensor([0.0, 90.0, 180.0, -90.0]), torch.zeros(4))
    assert all(torch.equal(turned[k], images[k].rot90(k, (1, 2))) for k in range(4))


def test_turning_goes_by_pixels_where_images_are_no_squares() -> None:
    images, _ = batch(1, 1, 5, 9)
    turned = warped(images, torch.tensor([90.0]), torch.zeros(1))
    assert torch.equal(turned[..., 2:7], images[..., 2:7].rot90(1, (2, 3)))
    assert not turned[..., :2].any()
    assert not turned[..., 7:].any()


def test_shear_pushes_rows_along() -> None:
    images, _ = batch(2, 2, 7, 11)
    pushed = warped(images, torch.zeros(2), torch.tensor([45.0, -45.0]))
    for k, sign in ((0, 1), (1, -1)):
        for row in range(7):
            shift, expected = sign * (row - 3), torch.zeros(2, 11)
            kept = slice(max(shift, 0), 11 + min(shift, 0))
            expected[:, kept] = images[k, :, row, max(-shift, 0) : 11 - max(shift, 0)]
            assert torch.equal(pushed[k, :, row], expected)


def test_turns_and_slants_make_no_new_values_but_empty() -> None:
    images, labels = batch(16, 3, 2, 12, 12)
    moved, _ = augment(AugmentSpec(rotate=30, shear=30), images, labels, empty=-1.0)
    for image, other in zip(images, moved, strict=True):
        assert set(other.unique().tolist()) <= {*image.unique().tolist(), -1.0}
    assert (moved == -1).any()


def test_cutout_empties_one_square() -> None:
    images, labels = batch(32, 3, 2, 10, 12)
    cut, _ = augment(AugmentSpec(cutout=4), images, labels, empty=-7.0)
    places = set()
    for image, other in zip(images, cut, strict=True):
        gone = (other == -7).flatten(0, 1).all(0)
        rows, columns = gone.any(1).nonzero(), gone.any(0).nonzero()
        assert gone.sum() == 16
        assert rows.max() - rows.min() == columns.max() - columns.min() == 3
        assert torch.equal(other[..., ~gone], image[..., ~gone])
        places.add((int(rows.min()), int(columns.min())))
    assert len(places) > 10


def test_mixup_mixes_labels_as_images() -> None:
    count = 10
    labels = torch.eye(count, dtype=torch.float64)
    images = labels.view(count, count, 1, 1).expand(count, count, 3, 3).contiguous()  # an image says which it is
    for alpha in (0.2, 1.0):
        torch.manual_seed(3)
        new, new_labels = mixed(images, labels, alpha)
        assert torch.equal(new[:, :, 1, 2], new_labels)
        assert ((new_labels > 0).sum(1) <= 2).all()
        assert torch.allclose(new_labels.sum(1), torch.ones(count, dtype=torch.float64))
        assert len(new_labels.diagonal().unique()) > 3  # each sample has a part of its own
    torch.manual_seed(3)
    assert torch.equal(augment(AugmentSpec(mixup=1.0), images, labels)[1], new_labels)


def test_mistakes() -> None:
    images, labels = batch(2, 1, 8, 10)
    mistake(lambda: augment(AugmentSpec(cutout=9), images, labels), "augment.cutout is 9", "8x10")
    mistake(lambda: augment(AugmentSpec(roll=9), images, labels), "augment.roll is 9")
    mistake(lambda: augment(AugmentSpec(crop=9), images, labels), "augment.crop is 9")
    mistake(lambda: parse(AugmentSpec, {"policy": "imagnet"}, "x.yaml"), "did you mean imagenet?")
    mistake(lambda: parse(AugmentSpec, {"shear": 90}, "x.yaml"), "shear")
    mistake(lambda: parse(AugmentSpec, {"rolls": 1}, "x.yaml"), "did you mean roll?")
