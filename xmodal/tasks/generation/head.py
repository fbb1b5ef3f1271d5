"""Learning to draw, and drawing: flow matching in pixels, with and without a text."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmodal.models.denoiser import flow
from xmodal.models.padding import Padding

# Of the logits of early times. Where things are seen, but hardly what they are, a text that is
# understood helps the most. With other times among those, a model from nothing takes in the words,
# but not for long their order: which thing is where.
_EARLY_STD = 0.3


class GenerationHead(nn.Module):
  """Denoising in training, and the loop that draws.

  Attributes:
    denoiser: what cleans pictures in -1..1.
    empty: tokens of a text that says nothing, which stand for a hidden caption.
    predicts: what the denoiser predicts, see models.flow.
    time_mean, time_std: of the logits of the times trained on.
    early_mean, early_steps: in the first steps of training times are near this one instead, and
      then spread.
    noises: noisy pictures that training makes of each example, whose text is read once.
    caption_drop: share of the captions that are hidden in training.
    guidance: how far to go from the velocity without a text to that with it (arXiv:2207.12598).
    guidance_interval: of times; outside it is 1 at most (arXiv:2404.07724).
    sampler, steps: see models.flow.integrate.
    strength: None: pictures are drawn from noise alone; else see tasks.generation.Start.
    scored: whether predict gives truth and loss beside the picture.
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
  guidance: float
  guidance_interval: tuple[float, float]
  sampler: str
  steps: int
  strength: float | None = None
  scored: bool = True
  on_step: Callable | None = None

  def __call__(self, towers, features: Mapping[str, jax.Array], *, deterministic: bool):
    """Returns the loss of each example, float32 [B].

    Its caption, time and noise are random; with deterministic they are the
    first, and functions of the example alone.
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
      # Not one batch after the other: each device keeps its own examples.
      return jnp.repeat(a, noises, axis=0)

    truth = each(x)
    predicted = self.denoiser(flow.between(truth, noise, t), t, each(text.tokens), each(text.mask),
                              deterministic=deterministic)
    error = flow.v_loss(predicted, truth, noise, t, self.predicts)
    error = error.reshape(batch, noises, *x.shape[1:]).mean(1)
    seen = Padding(extent, x.shape[1:3]).mask_like(x)
    if seen is None:
      return error.mean((1, 2, 3))
    return jnp.where(seen, error, 0).sum((1, 2, 3)) / jnp.maximum(seen.sum((1, 2, 3)), 1)

  def _spread_of_times(self, step):
    """Mean and deviation of the logits of times at steps int32 [B]: each a number or [B, 1]."""
    if step is None or not self.early_steps:
      return self.time_mean, self.time_std
    # As it was for a third of the early steps, then slowly on.
    share = jnp.clip(1.5 * step / self.early_steps - 0.5, 0, 1)[:, None]
    return tuple((1 - share) * early + share * late for early, late in zip(
        (self.early_mean, _EARLY_STD), (self.time_mean, self.time_std)))

  def predict(self, towers, features: Mapping[str, jax.Array]):
    """Returns 'image' uint8 [B, H, W, 3], of the first captions; if scored also 'truth', likewise,
    and 'loss' float32 [B]."""
    drawn, (truth, extent) = self._draw(towers, features), towers.image()
    image = jnp.round(127.5 * (jnp.clip(drawn, -1, 1) + 1)).astype(jnp.uint8)
    # Padding was never learned.
    arrays = {'image': Padding(extent, truth.shape[1:3]).clear(image)}
    if self.scored:
      arrays |= {'truth': truth, 'loss': self(towers, features, deterministic=True)}
    return arrays

  def _draw(self, towers, features):
    """float32 [B, H, W, 3]."""
    x, extent = _pictures(towers)
    noise = self._own_noise(features, x.shape[1:])
    velocity = self._velocity(towers, features['captions'][:, 0])
    # What is known goes straight from its noise: what is not to be drawn anew, and padding, whose
    # pixels were never learned.
    anew = Padding(extent, x.shape[1:3]).mask_like(x)
    if 'mask' in features:
      mask = features['mask'][..., None]
      anew = mask if anew is None else mask & anew
    if anew is None:
      return self._follow(velocity, x, noise)
    return self._follow(lambda z, t: jnp.where(anew, velocity(z, t), x - noise), x, noise)

  def _follow(self, velocity, x, noise):
    start = 0.0 if self.strength is None else 1.0 - self.strength
    z = noise if start == 0 else start * x + (1 - start) * noise
    return flow.integrate(velocity, z, steps=self.steps, sampler=self.sampler, start=start,
                          on_step=self.on_step)

  def _velocity(self, towers, tokens):
    """A function (z, t scalar) -> velocity, with guidance."""
    # Unbound, because a bound module cannot be called inside a compiled loop.
    denoiser, variables = self.denoiser.unbind()
    text, guided = towers.text(tokens), self.guidance != 1

    def interleaved(a, b):
      # Not one after the other: each device keeps its own examples.
      return jnp.stack([a, jnp.broadcast_to(b, a.shape)], axis=1).reshape(-1, *a.shape[1:])

    shown, mask = text.tokens, text.mask
    if guided:
      nothing = towers.text(jnp.array([self.empty], jnp.int32))
      shown = interleaved(shown, nothing.tokens)
      mask = interleaved(mask, nothing.mask)

    def velocity(z, t):
      double = jnp.repeat(z, 2, axis=0) if guided else z
      times = jnp.full(len(double), t)
      # Followed to the end: a picture that is predicted is reached, and nothing has to be clamped.
      least = 1e-3 if self.predicts == 'x' else flow.LEAST
      v = flow.velocity(denoiser.apply(variables, double, times, shown, mask), double, times,
                        self.predicts, least)
      if not guided:
        return v
      with_text, without = v[::2], v[1::2]
      low, high = self.guidance_interval
      scale = jnp.where((t >= low) & (t <= high), self.guidance, min(self.guidance, 1.0))
      return without + scale * (with_text - without)

    return velocity

  def _keys(self, features, stream):
    """A random key of each example and stream, whatever batch and device it is in."""
    key = jax.random.key(stream)
    return jax.vmap(lambda seed: jax.random.fold_in(key, seed))(features['seed'])

  def _own_noise(self, features, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape))(self._keys(features, 0))


def _pictures(towers):
  """The batch's pictures in -1..1, and their extent."""
  image, extent = towers.image()
  return image.astype(jnp.float32) / 127.5 - 1, extent
