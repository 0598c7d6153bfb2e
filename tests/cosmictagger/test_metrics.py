"""Scores counted by hand."""

import pytest
import torch

from cosmictagger.metrics import all_cosmic, confusion, scores


def test_confusion_counts_truth_by_prediction():
    label = torch.tensor([0, 0, 1, 1, 2, 2]).view(1, 1, 2, 3)
    tags = torch.tensor([0, 1, 1, 2, 2, 0]).view(1, 1, 2, 3)
    assert confusion(tags, label)[0, 0].tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]


def test_scores_average_over_images_then_planes():
    label = torch.zeros(2, 1, 1, 4, dtype=torch.uint8)
    label[0, 0, 0] = torch.tensor([1, 1, 2, 0])
    tags = torch.zeros_like(label)
    tags[0, 0, 0] = torch.tensor([1, 0, 2, 0])
    s = scores(confusion(tags, label))
    assert s.accuracy == pytest.approx((3 / 4 + 1) / 2)
    assert s.nonzero_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert s.cosmic_iou == pytest.approx((1 / 2 + 1) / 2)  # the second image has no cosmic: an empty union is 1
    assert s.neutrino_iou == 1
    assert s.mean_iou == pytest.approx((3 / 4 + 1) / 2)


def test_perfect_and_absent_classes():
    empty = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert set(scores(confusion(empty, empty)).as_dict().values()) == {1.0}
    wrong = scores(confusion(torch.full_like(empty, 2), empty))
    assert wrong.accuracy == 0
    assert wrong.neutrino_iou == 0
    assert wrong.cosmic_iou == 1


def test_baseline_calls_every_charged_pixel_cosmic():
    assert all_cosmic(torch.tensor([0.0, 5.0, 800.0])).tolist() == [0, 1, 1]


def test_misfits_are_refused():
    zero = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="equal"):
        confusion(zero, zero[:, :2])
    with pytest.raises(ValueError, match="between 0 and 2"):
        confusion(zero + 3, zero)
    with pytest.raises(ValueError, match="no images"):
        scores(torch.zeros(0, 3, 3, 3))
