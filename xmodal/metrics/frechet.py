"""Frechet distance of sets of pictures, with fixed random features.

The formula is that of FID (arXiv:1706.08500), but the features are not. Values are comparable only
for the same extractor, picture size and number of pictures, and never with a published FID.
"""

from collections.abc import Sequence

import cv2
import numpy as np

EXTRACTOR = 'random patch features'
LEAST_SIDE = 20  # pixels; in smaller pictures the smallest scale has no pixels inside its edge
_FILTERS, _WIDTH, _SCALES = 8, 5, 3
_LEVEL = 2  # filters of each scale that respond to brightness and colour (mean not 0)


def features(pictures: np.ndarray) -> np.ndarray:
  """Random patch features of pictures, uint8 [N, S, S, 3]: float64 [N, 24].

  At full, half and quarter size: 8 fixed random filters of 5x5 pixels with a ReLU,
  averaged over the picture. Six of them are 0 where the colour is constant. The
  features describe edges and textures, not content or position. S is LEAST_SIDE
  or more.
  """
  rng = np.random.default_rng(0)
  kernels = rng.normal(size=(_SCALES, _FILTERS, _WIDTH, _WIDTH, 3)).astype(np.float32)
  kernels[:, _LEVEL:] -= kernels[:, _LEVEL:].mean((2, 3), keepdims=True)
  kernels /= np.linalg.norm(kernels.reshape(_SCALES, _FILTERS, -1), axis=-1)[..., None, None, None]
  return np.stack([_of_picture(picture.astype(np.float32) / 127.5 - 1, kernels)
                   for picture in pictures]).astype(np.float64)


def _of_picture(picture, kernels):
  means = []
  edge = _WIDTH // 2  # excludes filter outputs that reach beyond the picture
  for of_scale in kernels:
    for kernel in of_scale:
      seen = sum(cv2.filter2D(picture[..., c], -1, kernel[..., c]) for c in range(3))
      means.append(np.maximum(seen[edge:-edge, edge:-edge], 0).mean())
    picture = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
  return np.array(means)


def frechet(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray
            ) -> float:
  """Distance of two Gaussians: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Dowson, Landau, 1982)."""
  # The trace of (C C')^(1/2) is that of the symmetric (C^(1/2) C' C^(1/2))^(1/2).
  values, vectors = np.linalg.eigh(cov)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  common = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_cov @ root), 0)).sum()
  return float(np.square(mean - other_mean).sum() + np.trace(cov + other_cov) - 2 * common)


def frechet_distance(pictures: Sequence[np.ndarray], real: Sequence[np.ndarray]) -> float:
  """Frechet distance of `features` between two sets of at least two pictures, uint8 [S, S, 3].

  Each feature is divided by its standard deviation over the real pictures, so that no
  filter dominates.
  """
  found, truth = features(np.stack(pictures)), features(np.stack(real))
  unit = truth.std(0) + 1e-6
  found, truth = found / unit, truth / unit
  return frechet(found.mean(0), np.cov(found.T), truth.mean(0), np.cov(truth.T))
