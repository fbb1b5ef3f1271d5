"""Frechet distance of sets of pictures, by fixed features that nobody trained.

The formula is that of FID (arXiv:1706.08500); the features are not: numbers compare with each other
where extractor, size of the pictures and number of them are the same, and with no published FID.
"""

from collections.abc import Sequence

import cv2
import numpy as np

EXTRACTOR = 'random patch features'
_FILTERS, _WIDTH, _SCALES, _CELLS = 8, 5, 3, 2


def features(pictures: np.ndarray) -> np.ndarray:
  """Random patch features of pictures, uint8 [N, S, S, 3]: float64 [N, 96].

  At the whole, half and quarter size: 8 fixed random filters of 5x5 pixels with
  a rectifier, averaged over the quarters of the picture. They see colours,
  edges and coarse places, and know nothing of what is shown. S is 20 or more.
  """
  rng = np.random.default_rng(0)
  kernels = rng.normal(size=(_SCALES, _FILTERS, _WIDTH, _WIDTH, 3)).astype(np.float32)
  kernels /= np.linalg.norm(kernels.reshape(_SCALES, _FILTERS, -1), axis=-1)[..., None, None, None]
  return np.stack([_of_picture(picture.astype(np.float32) / 127.5 - 1, kernels)
                   for picture in pictures]).astype(np.float64)


def _of_picture(picture, kernels):
  pooled = []
  for of_scale in kernels:
    for kernel in of_scale:
      seen = sum(cv2.filter2D(picture[..., c], -1, kernel[..., c]) for c in range(3))
      edge = _WIDTH // 2  # what is beyond the picture is not to count
      seen = np.maximum(seen[edge:-edge, edge:-edge], 0)
      pooled.append(cv2.resize(seen, (_CELLS, _CELLS), interpolation=cv2.INTER_AREA).ravel())
    picture = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
  return np.concatenate(pooled)


def frechet(mean: np.ndarray, cov: np.ndarray, other_mean: np.ndarray, other_cov: np.ndarray
            ) -> float:
  """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of two Gaussians (Dowson and Landau, 1982)."""
  # The trace of (C C')^(1/2) is that of the symmetric (C^(1/2) C' C^(1/2))^(1/2).
  values, vectors = np.linalg.eigh(cov)
  root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
  common = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other_cov @ root), 0)).sum()
  return float(np.square(mean - other_mean).sum() + np.trace(cov + other_cov) - 2 * common)


def frechet_distance(pictures: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
  """Frechet distance of EXTRACTOR between two sets of two pictures or more, uint8 [S, S, 3]."""
  of_both = []
  for those in (pictures, others):
    found = features(np.stack(those))
    of_both += [found.mean(0), np.cov(found.T)]
  return frechet(*of_both)
