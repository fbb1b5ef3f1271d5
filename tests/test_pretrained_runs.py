"""Every family of towers trains in configs/vqa.py, by config alone."""

import dataclasses
import importlib.util
import itertools

import pytest
import tiny

from xmodal.bench import parity_text, parity_vision
from xmodal.data.tokenizer import train_tokenizer

VISION = {case.family: case for case in reversed(parity_vision.CASES)}
TEXT = {case.family: case for case in reversed(parity_text.CASES)}
del VISION['siglip']  # the tower of siglip_vision_model in another file
# If the checkpoint states no size, or one too small for the shapes.
IMAGE_SIZES = {'resnet': 64, 'vgg': 64, 'dinov2': 42, 'dinov2_with_registers': 42}


@pytest.mark.parametrize('vision, text', list(itertools.zip_longest(VISION, TEXT)))
def test_a_tower_trains_in_the_first_config_of_readme(vision, text, tmp_path):
  spec = importlib.util.spec_from_file_location('vqa', 'configs/vqa.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.update_from_flattened_dict({
      'data.train_examples': 16, 'data.eval_examples': 8,
      'data.image_size': IMAGE_SIZES.get(vision), 'train.batch_size': 8, 'train.steps': 2,
      'train.samples': 0, 'optimizer.warmup_steps': 1})
  made = {'vision': VISION[vision].make()}
  if text:
    made['text'] = dataclasses.replace(
        TEXT[text], config={**TEXT[text].config, 'vocab_size': 300}).make()
  else:
    config.vqa.generation_weight = 0.0  # text towers above cover written answers
  for part, model in made.items():
    folder = tmp_path / part
    folder.mkdir()
    model.save_pretrained(folder)
    config.model[part].pretrained = str(folder)
  if text:
    words = ['what where which color shape is the red blue green circle square of there how many',
             'yes no']
    train_tokenizer(words, 250).save(tmp_path / 'text')
  final = tiny.train(tmp_path / 'run', config)
  assert final['step'] == 2 and final['skipped_steps'] == 0
  assert final['evaluation']['vqa']['examples'] == 8
