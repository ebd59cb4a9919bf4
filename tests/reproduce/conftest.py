"""What several experiments are tested on."""

import pytest
import torch

from data import load_images
from reproduce.images import Splits


@pytest.fixture
def splits() -> Splits:
    """60 of scikit-learn's digits to train on, of which 12 are the validation images as well, and 20 to test on."""
    data = load_images("digits", train=60, test=20)
    return Splits(data.train, data.train.take(torch.arange(12)), data.test, data)
