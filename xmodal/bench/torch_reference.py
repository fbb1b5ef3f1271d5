"""The PyTorch reference: a config's model and training step, built from transformers' modules.

The vision tower is ViTModel without a class token, like ours. The text tower is
T5EncoderModel, or T5ForConditionalGeneration if the answer is generated too. The
rest is torch.nn, one module for each of ours, with our names. All attention is
torch's scaled_dot_product_attention.
"""

import functools

from flax import traverse_util
import jax.numpy as jnp
import torch
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, ViTConfig, ViTModel

from xmodal.bench.torch_optimizer import make_descent, make_optimizer
from xmodal.errors import UserError
from xmodal.models import parts
from xmodal.pretrained import t5
from xmodal.pretrained.tensors import Entry, read_variables
from xmodal.train import build


class PatchEmbeddings(nn.Module):
  """Patch and position embeddings, without a class token: [B, 3, H, W] -> [B, N, D]."""

  def __init__(self, patch_embeddings, hidden_dim):
    super().__init__()
    self.patch_embeddings = patch_embeddings
    self.position_embedding = nn.Parameter(
        0.02 * torch.randn(patch_embeddings.num_patches, hidden_dim))

  def forward(self, images, **_):
    return self.patch_embeddings(images) + self.position_embedding


class MultiHeadAttention(nn.Module):
  """[B, Q, D] attends to [B, K, D], mask bool broadcastable to [B, H, Q, K]."""

  def __init__(self, width, num_heads):
    super().__init__()
    self.num_heads = num_heads
    self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

  def forward(self, inputs, context, mask=None):
    def heads(x):
      return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        heads(self.query(inputs)), heads(self.key(context)), heads(self.value(context)),
        attn_mask=mask)
    return self.out(output.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
  """Two linear layers with a tanh GELU between."""

  def __init__(self, width, mlp_dim):
    super().__init__()
    self.up, self.down = nn.Linear(width, mlp_dim), nn.Linear(mlp_dim, width)

  def forward(self, x):
    return self.down(F.gelu(self.up(x), approximate='tanh'))


class CoAttentionLayer(nn.Module):
  """As models.cross_modal.CoAttentionLayer."""

  def __init__(self, width, mlp_dim, num_heads):
    super().__init__()
    for stream in ('vision', 'text'):
      for part in ('cross', 'self'):
        self.add_module(f'{stream}_{part}_norm', _norm(width))
        self.add_module(f'{stream}_{part}', MultiHeadAttention(width, num_heads))
      self.add_module(f'{stream}_mlp_norm', _norm(width))
      self.add_module(f'{stream}_mlp', Mlp(width, mlp_dim))

  def forward(self, vision, text, text_mask):
    seen, read = self.vision_cross_norm(vision), self.text_cross_norm(text)
    vision = vision + self.vision_cross(seen, read, text_mask)
    text = text + self.text_cross(read, seen)
    seen, read = self.vision_self_norm(vision), self.text_self_norm(text)
    vision = vision + self.vision_self(seen, seen)
    text = text + self.text_self(read, read, text_mask)
    vision = vision + self.vision_mlp(self.vision_mlp_norm(vision))
    return vision, text + self.text_mlp(self.text_mlp_norm(text))


class CrossModal(nn.Module):
  """The co-attention layers."""

  def __init__(self, hidden_dim, mlp_dim, num_heads, num_layers):
    super().__init__()
    self.layers = nn.ModuleList(
        CoAttentionLayer(hidden_dim, mlp_dim, num_heads) for _ in range(num_layers))

  def forward(self, vision, text, text_mask):
    for layer in self.layers:
      vision, text = layer(vision, text, text_mask)
    return vision, text


class GridPosition(nn.Module):
  """As models.joint.GridPosition, without a class token."""

  def __init__(self, grid, width):
    super().__init__()
    self.row_embedding, self.column_embedding = (
        nn.Parameter(torch.randn(places, width)) for places in grid)

  def forward(self, tokens):
    turned = self.column_embedding.roll(self.column_embedding.shape[1] // 2, 1)
    return tokens + (self.row_embedding[:, None] + turned).flatten(0, 1)


class SumPool(nn.Module):
  """As models.joint.SumPool."""

  def __init__(self, width):
    super().__init__()
    self.vision_projection, self.text_projection = nn.Linear(width, width), nn.Linear(width, width)

  def forward(self, vision, text, text_mask):
    seen = vision.sum(1) * vision.shape[1] ** -0.5
    is_text = text_mask[..., None].to(text.dtype)
    read = (text * is_text).sum(1) * is_text.sum(1).clamp(min=1) ** -0.5
    return self.vision_projection(seen) + self.text_projection(read)


class Reference(nn.Module):
  """Maps a batch of the vqa task to its loss, with the modules and names of our MultiTask."""

  def __init__(self, config, vocab_size, num_answers, pad_id):
    """Initialises parameters randomly; UserError if transformers has no such model."""
    super().__init__()
    vision, text, cross = (parts.fields(config.model, t) for t in ('vision', 'text', 'cross'))
    if (config.model.vision.name != 'vit' or 'stem' in vision or config.model.text.name != 't5'
        or config.model.cross.variant != 'co_attention' or config.model.dropout_rate
        or config.model.remat not in ('auto', 'none')):
      raise UserError(
          'the PyTorch reference is a ViT of patches, a T5, co-attention, no dropout and no remat; '
          f'found model.size={config.model.size}, vision.name={config.model.vision.name}, '
          f'text.name={config.model.text.name}, cross.variant={config.model.cross.variant}, '
          f'dropout_rate={config.model.dropout_rate}, remat={config.model.remat}: change that, or '
          'measure only ours with --ways ours')
    self.pad_id = pad_id
    self.generation_weight = config.vqa.generation_weight
    self.vision_tower = _vision_tower(vision, config.data.image_size)
    self.text_tower = _text_tower(text, vocab_size, pad_id, decoder=self.generation_weight > 0)
    width = cross['hidden_dim']
    self.vision_projection = nn.Linear(vision['hidden_dim'], width)
    self.vision_gate = nn.Linear(vision['hidden_dim'], 1)
    self.text_projection = nn.Linear(text['hidden_dim'], width)
    side = config.data.image_size // vision['patch_size']
    self.grid_position = GridPosition((side, side), width)
    self.cross_modal = CrossModal(**{key: cross[key] for key in parts.WIDTHS if key in cross})
    self.pool = SumPool(width)
    self.hidden, self.answers = nn.Linear(width, width), nn.Linear(width, num_answers)
    if self.generation_weight:
      self.decoder_projection = nn.Linear(width, text['hidden_dim'])

  def logits(self, batch):
    """Logits of the answers, float32 [B, A].

    Args:
      batch: image uint8 [B, H, W, 3] and question int64 [B, L].
    """
    return self._answer(batch)[0]

  def forward(self, batch):
    """batch: tensors of image uint8 [B, H, W, 3] and the vqa features; returns the scalar loss."""
    logits, tokens, mask = self._answer(batch)
    loss = F.cross_entropy(logits, batch['target_ids'][:, 0].long())
    if self.generation_weight:
      loss = loss + self.generation_weight * self._written_loss(batch['answer'], tokens, mask)
    return loss

  def _answer(self, batch):
    """Logits, the fused tokens of both streams [B, N + L, D], and their mask."""
    image = (batch['image'].permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    mask = batch['question'] != self.pad_id
    vision = self.vision_tower(image).last_hidden_state
    text = self.text_tower.encoder(
        input_ids=batch['question'], attention_mask=mask).last_hidden_state
    salience = self.vision_gate(vision).sigmoid()
    placed = self.grid_position(self.vision_projection(vision) * salience)
    vision, text = self.cross_modal(placed, self.text_projection(text), mask[:, None, None])
    pooled = self.pool(vision * salience, text, mask)
    logits = self.answers(F.gelu(self.hidden(pooled), approximate='tanh')).float()
    tokens = torch.cat([vision, text], 1)
    return logits, tokens, torch.cat([mask.new_ones(vision.shape[:2]), mask], 1)

  def _written_loss(self, answer, tokens, mask):
    given = F.pad(answer[:, :-1], (1, 0), value=self.pad_id)
    hidden = self.text_tower.decoder(
        input_ids=given, encoder_hidden_states=self.decoder_projection(tokens),
        encoder_attention_mask=mask, use_cache=False).last_hidden_state
    logits = self.text_tower.lm_head(hidden).float()
    losses = F.cross_entropy(logits.transpose(1, 2), answer, reduction='none')
    is_text = answer != self.pad_id
    return ((losses * is_text).sum(1) / is_text.sum(1)).mean()


def make_step(model: Reference, config, compiled: bool):
  """A training step: batch of tensors -> (loss, gradient norm before clipping)."""
  descend = make_descent(model, make_optimizer(model, config.optimizer, decays),
                         config.optimizer.clip_norm)
  forward = torch.compile(model) if compiled else model
  device = next(model.parameters()).device.type
  half = build.compute_dtype(config) == jnp.bfloat16

  def step(batch):
    with torch.autocast(device, torch.bfloat16, enabled=half):  # parameters stay float32
      loss = forward(batch)
    return descend(loss)

  return step


def decays(name: str, parameter: nn.Parameter) -> bool:
  """Whether weight decay applies: not to biases, norms and positions, as for ours."""
  return (name.endswith('.weight') and parameter.ndim > 1
          and 'relative_attention_bias' not in name)


def parameters_for_ours(model: Reference, ours, shapes) -> dict:
  """Converts the reference's parameters to our model's.

  Args:
    model: the reference.
    ours: our models.joint.MultiTask.
    shapes: pytree of our parameters, or of their shapes and dtypes.

  Returns:
    Pytree of arrays, as `shapes`.

  Raises:
    UserError: a parameter has no counterpart, or one of another shape.
  """
  tensors = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
  backbone = {**shapes['backbone']}
  text_shapes, text_prefix = backbone.pop('text_tower'), 'text_tower.'
  text = {name.removeprefix(text_prefix): tensors.pop(name)
          for name in list(tensors) if name.startswith(text_prefix)}
  rest = {'params': {**shapes, 'backbone': backbone}}
  entries = [_entry(path) for path in traverse_util.flatten_dict(rest, sep='/')]
  params = read_variables(tensors, entries, rest)['params']
  tower = ours.backbone.text_tower
  params['backbone']['text_tower'] = read_variables(
      text, t5.entries(tower, tower), {'params': text_shapes})['params']
  return params


def _vision_tower(sizes, image_size):
  model = ViTModel(ViTConfig(
      hidden_size=sizes['hidden_dim'], num_hidden_layers=sizes['num_layers'],
      num_attention_heads=sizes['num_heads'], intermediate_size=sizes['mlp_dim'],
      patch_size=sizes['patch_size'], image_size=image_size, layer_norm_eps=1e-6,
      hidden_act='gelu', hidden_dropout_prob=0.0, attn_implementation='sdpa'),
      add_pooling_layer=False)
  model.embeddings = PatchEmbeddings(model.embeddings.patch_embeddings, sizes['hidden_dim'])
  return model


def _text_tower(sizes, vocab_size, pad_id, decoder):
  kind = T5ForConditionalGeneration if decoder else T5EncoderModel
  model = kind(T5Config(
      vocab_size=vocab_size, d_model=sizes['hidden_dim'], d_kv=sizes['head_dim'],
      num_heads=sizes['num_heads'], d_ff=sizes['mlp_dim'], num_layers=sizes['num_layers'],
      num_decoder_layers=sizes['num_decoder_layers'], feed_forward_proj='gated-gelu',
      dropout_rate=0.0, pad_token_id=pad_id, attn_implementation='sdpa'))
  if decoder:  # transformers always ties its output layer to the embedding
    model.lm_head = nn.Linear(sizes['hidden_dim'], vocab_size, bias=False)
  return model


_norm = functools.partial(nn.LayerNorm, eps=1e-6)

_VIT_NAMES = {
    'stem.projection': 'embeddings.patch_embeddings.projection',
    'position_embedding': 'embeddings.position_embedding', 'attention_norm': 'layernorm_before',
    'mlp_norm': 'layernorm_after', 'final_norm': 'layernorm', '.query.': '.q_proj.',
    '.key.': '.k_proj.', '.value.': '.v_proj.', '.out.': '.o_proj.', '.up.': '.fc1.',
    '.down.': '.fc2.'}


def _entry(path):
  """The Entry of a path such as 'params/backbone/cross_modal/layers/text_mlp/up/kernel'."""
  name = path.split('/', 2)[2].replace('/', '.').replace('layers.', 'layers.{}.')
  if name.startswith('vision_tower.'):
    for ours, theirs in _VIT_NAMES.items():
      name = name.replace(ours, theirs)
  layout = 'same'
  if name.endswith('.kernel'):
    layout = 'patch' if 'patch_embeddings' in name else 'linear'
  name = name.replace('.kernel', '.weight').replace('.scale', '.weight')
  return Entry(path, name, layout)
