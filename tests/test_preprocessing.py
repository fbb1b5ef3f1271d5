"""Preprocessing in checkpoint files, read as AutoImageProcessor does."""

import json

import numpy as np
import pytest
import transformers

from xmodal.errors import UserError
from xmodal.pretrained import vit
from xmodal.pretrained.preprocessing import read_preprocessing

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
SQUARE = {'image_processor_type': 'ViTImageProcessor', 'size': {'height': 16, 'width': 16}}


def read(folder, config=None):
  return read_preprocessing(str(folder), config or {}, vit.PREPROCESSING, None)


@pytest.mark.parametrize('nested', [False, True], ids=['preprocessor_config', 'processor_config'])
@pytest.mark.parametrize('stated', [
    SQUARE, SQUARE | {'rescale_factor': 1 / 127.5}, SQUARE | {'do_rescale': False},
    SQUARE | {'do_normalize': False}, SQUARE | {'do_normalize': False, 'do_rescale': False},
    SQUARE | {'image_mean': [0.1, 0.2, 0.3], 'image_std': [0.5, 0.6, 0.7], 'rescale_factor': 0.5},
    SQUARE | {'do_rescale': False, 'image_mean': [110, 111, 112], 'image_std': [50, 60, 70]},
    SQUARE | {'image_mean': 0.5, 'image_std': 0.25}, SQUARE | {'do_rescale': None},
    {'image_processor_type': 'CLIPImageProcessor'},
    {'image_processor_type': 'ViTImageProcessorFast'},
    {'image_processor_type': 'BitImageProcessor', 'image_mean': [0.1, 0.2, 0.3]},
    {'feature_extractor_type': 'ConvNextFeatureExtractor'}, {'size': 16}])
def test_pixels_are_those_of_transformers(stated, nested, tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
  if nested:  # it takes precedence over the other file
    (tmp_path / 'processor_config.json').write_text(json.dumps({'image_processor': stated}))
    stated = {'image_mean': [9, 9, 9]}
  (tmp_path / 'preprocessor_config.json').write_text(json.dumps(stated))
  theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
  pixels = theirs(PIXELS, do_resize=False, do_center_crop=False, return_tensors='np')
  pixels = pixels['pixel_values'][0].transpose(1, 2, 0)
  ours = read(tmp_path)
  found = (PIXELS / 255 - ours.mean) / ours.std
  assert np.abs(found - pixels).max() < 1e-6 * max(np.abs(pixels).max(), 1)
  size = theirs.crop_size if theirs.do_center_crop else theirs.size
  assert ours.image_size == (size['height'], size['width']) if 'height' in size else True


def test_a_processor_of_text_alone_says_nothing_of_pictures(tmp_path):
  (tmp_path / 'processor_config.json').write_text('{"processor_class": "SiglipProcessor"}')
  (tmp_path / 'preprocessor_config.json').write_text('{"image_mean": [0.1, 0.2, 0.3]}')
  assert read(tmp_path).mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize('name, stated, words', [
    ('preprocessor_config', {'rescale_factor': 0}, 'rescale_factor is 0; wanted a number above 0'),
    ('preprocessor_config', {'rescale_factor': 'x'}, "rescale_factor is 'x'"),
    ('preprocessor_config', {'image_std': [1, float('nan'), 1]}, 'wanted three numbers, for'),
    ('preprocessor_config', {'image_mean': {'red': 1}}, 'wanted three numbers, for'),
    ('preprocessor_config', {'image_std': 0}, 'image_std is 0; wanted three numbers above 0'),
    ('preprocessor_config', {'size': {'height': 0, 'width': 4}}, 'wanted height and width'),
    ('preprocessor_config', {'size': [1, 2, 3]}, 'wanted height and width'),
    ('preprocessor_config', {'size': 'large'}, 'wanted height and width'),
    ('preprocessor_config', {'size': 16.5}, 'wanted height and width'),
    ('preprocessor_config', {'rescale_offset': True}, 'rescale_offset is True'),
    ('preprocessor_config', {'image_processor_type': 'MobileViTImageProcessor'}, 'do_flip_channel'),
    ('processor_config', {'image_processor': [1]}, r'image_processor is \[1\], wanted an object'),
    ('processor_config', {'image_processor': {'image_mean': 'x'}}, "image_mean is 'x'")])
def test_settings_that_cannot_be_followed(name, stated, words, tmp_path):
  (tmp_path / f'{name}.json').write_text(json.dumps(stated))
  with pytest.raises(UserError, match=words) as error:
    read(tmp_path)
  assert f'{name}.json' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('timm', [
    'x', {'input_size': 'x'}, {'mean': [1]}, {'std': [0, 1, 1]}, {'input_size': [3, 0, 4]}])
def test_settings_of_timm_that_cannot_be_followed(timm, tmp_path):
  with pytest.raises(UserError, match='config.json: '):
    read(tmp_path, {'pretrained_cfg': timm})
