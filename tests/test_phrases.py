"""A --text with several texts is parsed alike by every task."""

import pytest

from xmodal import config as configs
from xmodal.data.example import Example, Object
from xmodal.data.tokenizer import train_tokenizer
from xmodal.tasks.detection.task import Detection
from xmodal.tasks.phrases import split_texts
from xmodal.tasks.retrieval.task import Retrieval

TEXTS = {
    'usb 3.0 cable. mouse.': ('usb 3.0 cable', 'mouse'),
    'usb 3.0. mouse': ('usb 3.0', 'mouse'),
    'U.S. flag.': ('U.S. flag',),
    'a flag of the U.S.': ('a flag of the U.S.',),
    'Mt. Fuji. St. Bernard; no. 5 sign.\nDr. Pepper can': (
        'Mt. Fuji', 'St. Bernard', 'no. 5 sign', 'Dr. Pepper can'),
    'photo of George W. Bush. dog': ('photo of George W. Bush', 'dog'),
    'red  circle .  blue square ..  red circle.': ('red circle', 'blue square'),
    'www.site.com logo. .5 inch bolt.': ('www.site.com logo', '.5 inch bolt'),
    '红色的圆。蓝色的方块；猫': ('红色的圆', '蓝色的方块', '猫'),
    'लाल कार। नीली नाव।': ('लाल कार', 'नीली नाव'),
    'vitamin c. vitamin d.': ('vitamin c', 'vitamin d'),
    ' . ;\n': (),
}


@pytest.mark.parametrize('text', TEXTS)
def test_full_stops_end_texts_and_not_words(text):
  assert split_texts(text) == TEXTS[text]


@pytest.mark.parametrize('text, names', [
    ('plan b. c; d. etc. dog. what?', ('plan b. c; d', 'etc.', 'dog', 'what?')),
    ('A. B. dog', ('A', 'B', 'dog')),
    ('Yahoo!. dog. Yahoo! sign', ('Yahoo!', 'dog', 'Yahoo! sign')),
    ('etc.', ('etc.',)), ('no. 5. no. 5 sign.', ('no. 5', 'no. 5 sign'))])
def test_names_of_training_are_taken_whole(text, names):
  known = ('plan b. c; d', 'etc.', 'A', 'B', 'dog', 'Yahoo!', 'what?', 'no. 5', '')
  assert split_texts(text, known) == names


@pytest.mark.parametrize('text', ['usb 3.0 cable. mouse.', 'U.S. flag; usb 3.0 cable', 'a dog。猫'])
def test_tasks_ask_for_the_same(text):
  config = configs.base()
  names = ('usb 3.0 cable', 'U.S. flag', 'mouse')
  tokenizer = train_tokenizer(names, 100)
  detection = Detection.from_data(config, tokenizer, [
      Example('a.png', objects=tuple(Object(name, (1, 1, 5, 5)) for name in names))])
  retrieval = Retrieval.from_data(config, tokenizer, [Example('a.png', captions=names)])
  wanted = split_texts(text)
  assert len(wanted) == 2
  assert detection.query('a.png', text)[0].names == wanted
  assert retrieval.query('a.png', text)[1][0].captions == wanted
