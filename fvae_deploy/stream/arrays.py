"""Array types of a stream, one name per meaning. Arrays in HU are `volume.base.HuFrames`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ModelFrames = NDArray[np.float32]  # [C, T, H, W] in the model's range
LatentFrames = NDArray[np.float32]  # [D, k, h, w]
FeatureMap = NDArray[np.float32]  # [C, T, H, W] between two stages, or at the ends
