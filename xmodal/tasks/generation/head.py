"""The generation head: training and sampling by flow matching in pixels."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from xmodal.models.denoiser import flow
from xmodal.models.padding import Padding

# Standard deviation of logit(t) in early training. At times where objects are visible but hardly
# recognisable, understanding the text helps most. With other times among them, a model trained from
# scratch learns the words, but takes long to learn their order: which object is where.
_EARLY_STD = 0.3


class GenerationHead(nn.Module):
  """Denoising loss in training, and the sampling loop.

  Attributes:
    denoiser: a models.denoiser.denoiser.Denoiser, for pictures in -1..1.
    empty: tokens of an empty text, which replace a dropped caption.
    predicts: prediction target of the denoiser, see models.denoiser.flow.
    time_mean, time_std: mean and standard deviation of logit(t) for training times t.
    early_mean, early_steps: during the first early_steps steps the mean of logit(t) moves from
      early_mean to time_mean, and its standard deviation grows to time_std.
    noises: noisy pictures per example in a training step; the text is encoded once.
    caption_drop: share of captions dropped in training.
    guidance: scale of classifier-free guidance (arXiv:2207.12598); None: see predict.
    guidance_interval: times with guidance; at other times the scale is at most 1
      (arXiv:2404.07724).
    sampler, steps: see models.denoiser.flow.integrate; steps None: see predict.
    strength: None: sampling starts from noise; else see tasks.generation.task.Start.
    scored: whether predict also returns the true picture and the loss.
    on_step: see models.denoiser.flow.integrate.
  """

  denoiser: nn.Module
  empty: tuple[int, ...]
  predicts: str
  time_mean: float
  time_std: float
  early_mean: float
  early_steps: int
  noises: int
  caption_drop: float
  guidance: float | None
  guidance_interval: tuple[float, float]
  sampler: str
  steps: int | None
  strength: float | None = None
  scored: bool = True
  on_step: Callable | None = None

  def __call__(self, towers, features: Mapping[str, Any], *, deterministic: bool
               ) -> Float[Array, ' B']:
    """Returns the per-example loss, float32 [B].

    Caption, time and noise are random. If deterministic, the caption is the first,
    and time and noise depend on the example only.
    """
    captions, batch = features['captions'], len(features['seed'])
    x, extent = _pictures(towers)
    if deterministic:
      tokens = captions[:, 0]
      noise = self._own_noise(features, x.shape[1:])
      t = jax.vmap(lambda key: flow.draw_times(key, (), self.time_mean, self.time_std))(
          self._keys(features, 1))
    else:
      keys = jax.random.split(self.make_rng('dropout'), 4)
      place = jax.random.randint(keys[0], (batch,), 0, jnp.maximum(features['count'], 1))
      tokens = jnp.take_along_axis(captions, place[:, None, None], axis=1)[:, 0]
      hidden = jax.random.bernoulli(keys[1], self.caption_drop, (batch, 1))
      tokens = jnp.where(hidden, jnp.array(self.empty), tokens)
      noise = jax.random.normal(keys[2], (batch * self.noises, *x.shape[1:]))
      mean, std = self._spread_of_times(towers.step)
      t = flow.draw_times(keys[3], (batch, self.noises), mean, std).reshape(-1)
    text, noises = towers.text(tokens), len(noise) // batch

    def each(a):
      # Copies in consecutive rows, so that each device keeps its own examples.
      return jnp.repeat(a, noises, axis=0)

    truth = each(x)
    predicted = self.denoiser(flow.between(truth, noise, t), t, each(text.tokens), each(text.mask),
                              deterministic=deterministic)
    error = flow.v_loss(predicted, truth, noise, t, self.predicts)
    error = error.reshape(batch, noises, *x.shape[1:]).mean(1)
    mask = Padding(extent, x.shape[1:3]).mask_like(x)
    if mask is None:
      return error.mean((1, 2, 3))
    return jnp.where(mask, error, 0).sum((1, 2, 3)) / jnp.maximum(mask.sum((1, 2, 3)), 1)

  def _spread_of_times(self, step):
    """Mean and standard deviation of logit(t) at steps int32 [B]: each a number or [B, 1]."""
    if step is None or not self.early_steps:
      return self.time_mean, self.time_std
    # Constant for a third of the early steps, then linear.
    share = jnp.clip(1.5 * step / self.early_steps - 0.5, 0, 1)[:, None]
    return tuple((1 - share) * early + share * late for early, late in zip(
        (self.early_mean, _EARLY_STD), (self.time_mean, self.time_std)))

  def predict(self, towers, features: Mapping[str, Any]) -> dict[str, Array]:
    """Samples pictures for the first captions.

    features['sampling'] may hold 'guidance', 'steps' and 'start' (scalars), which then count in
    place of the head's: one program serves all values.

    Returns:
      'image' uint8 [B, H, W, 3]; if scored also 'truth', likewise, and 'loss' float32 [B].
    """
    sampled, (truth, extent) = self._sample(towers, features), towers.image()
    image = jnp.round(127.5 * (jnp.clip(sampled, -1, 1) + 1)).astype(jnp.uint8)
    # The padding has no training signal.
    arrays = {'image': Padding(extent, truth.shape[1:3]).clear(image)}
    if self.scored:
      arrays |= {'truth': truth, 'loss': self(towers, features, deterministic=True)}
    return arrays

  def _sample(self, towers, features):
    """Samples pictures in -1..1, float32 [B, H, W, 3]."""
    x, extent = _pictures(towers)
    noise = self._own_noise(features, x.shape[1:])
    sampling = features.get('sampling', {})
    velocity = self._velocity(towers, features['captions'][:, 0],
                              sampling.get('guidance', self.guidance))
    # Pixels outside the mask, and padding (which has no training signal), use their true velocity.
    repaint = Padding(extent, x.shape[1:3]).mask_like(x)
    if 'mask' in features:
      mask = features['mask'][..., None]
      repaint = mask if repaint is None else mask & repaint
    if repaint is None:
      return self._integrate(velocity, x, noise, sampling)
    return self._integrate(lambda z, t: jnp.where(repaint, velocity(z, t), x - noise), x, noise,
                           sampling)

  def _integrate(self, velocity, x, noise, sampling):
    start = 0.0 if self.strength is None else 1.0 - self.strength
    start = sampling.get('start', start)
    z = noise if isinstance(start, float) and start == 0 else start * x + (1 - start) * noise
    return flow.integrate(velocity, z, steps=sampling.get('steps', self.steps),
                          sampler=self.sampler, start=start, on_step=self.on_step)

  def _velocity(self, towers, tokens, guidance):
    """The function (z, t scalar) -> velocity, with guidance."""
    # Unbound: a bound module cannot be called inside a compiled loop.
    denoiser, variables = self.denoiser.unbind()
    text = towers.text(tokens)
    guided = not isinstance(guidance, (int, float)) or guidance != 1

    def interleaved(a, b):
      # Interleaved rows, so that each device keeps its own examples.
      return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(-1, *a.shape[1:])

    text_tokens, mask = text.tokens, text.mask
    if guided:
      empty = towers.text(jnp.array([self.empty], jnp.int32))
      text_tokens = interleaved(text_tokens, empty.tokens)
      mask = interleaved(mask, empty.mask)

    def velocity(z, t):
      double = jnp.repeat(z, 2, axis=0) if guided else z
      times = jnp.full(double.shape[0], t)
      # With x-prediction the last step reaches the predicted picture, so a smaller bound is safe.
      least = 1e-3 if self.predicts == 'x' else flow.LEAST
      v = flow.velocity(denoiser.apply(variables, double, times, text_tokens, mask), double, times,
                        self.predicts, least)
      if not guided:
        return v
      with_text, without = v[::2], v[1::2]
      low, high = self.guidance_interval
      scale = jnp.where((t >= low) & (t <= high), guidance, jnp.minimum(guidance, 1.0))
      return without + scale * (with_text - without)

    return velocity

  def _keys(self, features, stream):
    """Per-example random keys of a stream, independent of batch and device."""
    key = jax.random.key(stream)
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(features['seed'])

  def _own_noise(self, features, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(self._keys(features, 0))


def _pictures(towers):
  """The batch's pictures in -1..1, and their extent."""
  image, extent = towers.image()
  return image.astype(jnp.float32) / 127.5 - 1, extent
