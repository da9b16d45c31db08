"""Grading: predictions in any batches, the confusion matrix by a loop, its picture."""

import pytest
import torch
from PIL import Image

from spikegen.classifier import ClassifierConfig, SpikingClassifier
from spikegen.grading import confusion, draw_confusion, predict
from spikegen.images import to_model
from tests.inputs import mistake


@pytest.mark.parametrize("encoding", ["direct", "rate"])
def test_predictions_do_not_depend_on_the_batch(encoding):
    torch.manual_seed(0)
    config = ClassifierConfig.model_validate({"stages": [{"channels": 4}], "encoding": {"kind": encoding}})
    model = SpikingClassifier(config, (1, 8, 8), ("cat", "dog")).eval()
    images = torch.randint(0, 256, (11, 1, 8, 8), dtype=torch.uint8)
    whole = predict(model, images, 11, seed=3)
    torch.testing.assert_close(whole, predict(model, images, 4, seed=3))
    torch.testing.assert_close(whole, model(to_model(images), seed=3).logits)
    for votes in (0, 2):
        mistake(lambda v=votes: predict(model, images, votes=v), f"votes: {votes}", "`views` says how")


def test_the_confusion_matrix_is_that_of_a_loop(tmp_path):
    predicted, labels = torch.randint(4, (50,)), torch.randint(3, (50,))
    counts = confusion(predicted, labels, 4)
    for i in range(4):
        for j in range(4):
            both = sum(1 for p, y in zip(predicted, labels, strict=True) if (y, p) == (i, j))
            assert counts[i, j] == both
    draw_confusion(counts.tolist(), ("cat", "dog", "bird", "fish"), tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 300


def test_a_hundred_classes_can_be_drawn(tmp_path):
    counts = torch.randint(9, (101, 101))
    draw_confusion(counts.tolist(), tuple(f"class {k}" for k in range(101)), tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").stat().st_size > 10_000
