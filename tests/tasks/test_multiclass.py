"""One class per image: its loss."""
import numpy as np
import pytest
import torch
from torch import nn

from noah_zoo.data import create_dataset
from noah_zoo.tasks.multiclass import Multiclass, class_weights
from noah_zoo.training import TrainConfig


def test_class_weights(photos):
    images = create_dataset('folder', str(photos), 'train')
    weights = class_weights(images)
    counts = dict(zip(images.class_names, weights.tolist()))
    assert counts == pytest.approx({'red': 42 / 3 / 24, 'blue': 42 / 3 / 12, 'green': 42 / 3 / 6})
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0])
    config = TrainConfig(model='', output='', class_weights=True, smoothing=0.1)
    expected = nn.functional.cross_entropy(logits, labels, weights, label_smoothing=0.1)
    torch.testing.assert_close(Multiclass().create_criterion(config, images)(logits, labels), expected)
    config.mixup = 0.2  # soft targets, smoothed by timm's Mixup
    soft = torch.rand(6, 3).softmax(1)
    expected = -(soft * weights * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(Multiclass().create_criterion(config, images)(logits, soft), expected)
    with pytest.raises(ValueError, match="class_weights: no training images of 'red'"):
        class_weights(images.take(np.flatnonzero(images.labels != images.class_names.index('red'))))
