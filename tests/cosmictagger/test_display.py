"""Single pixels must be seen, however much a picture shrinks."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from cosmictagger.display import COSMIC, NEUTRINO, NIGHT, NOISE, event_panels


@pytest.mark.parametrize("shape", [(1280, 2048), (7, 1030), (4, 6)])
def test_one_pixel_stays_visible(shape):
    image = np.zeros((1, *shape), np.float32)
    truth = np.zeros((1, *shape), np.uint8)
    image[0, 2, 3], image[0, 3, 5], image[0, 0, 0] = 6, 50, 5
    truth[0, 2, 3], truth[0, 3, 5] = 1, 2
    [[charge, true, tagged]] = event_panels(image, truth, np.zeros_like(truth))
    colours = [(imread(io.BytesIO(p.png))[..., :3] * 255).round().astype(int) for p in (charge, true, tagged)]
    assert colours[0].shape[1] <= 1024
    seen = {tuple(c) for c in colours[1].reshape(-1, 3).tolist()}
    assert seen == {NIGHT, NOISE, COSMIC, NEUTRINO}
    assert (colours[0] != NIGHT).any(-1).sum() == (colours[2] == NOISE).all(-1).sum() == 3
