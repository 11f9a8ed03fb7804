"""What can be seen in a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.image import imread


def width_drawn(path, colour):
    """The share of a picture's columns in which ``colour`` occurs: a curve crosses most, a legend's sample does not."""
    rgb = np.round(255 * imread(path)[..., :3]).astype(int)
    return np.all(rgb == np.round(255 * np.array(to_rgb(colour))), axis=-1).any(axis=0).mean()
