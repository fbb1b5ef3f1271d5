"""Scores of captions against the code that COCO's authors publish."""

import random
import shutil

import pytest

from xmodal.metrics import captioning

WORDS = 'a man dog cat red ball on with the runs in park blue and two of'.split()

# Tokens of each by coco-caption, including Stanford's Java program.
TREEBANK = {
    "A man's dog isn't here. It doesn't, can't, won't, cannot; I'm gonna":
        "a man 's dog is n't here it does n't ca n't wo n't can not i 'm gon na",
    'A black-and-white T-shirt (with letters) costs $5, 50% off at 10:30 a.m. or 3,000 1/2':
        'a black-and-white t-shirt -lrb- with letters -rrb- costs $ 5 50 % off at 10:30 a.m. or '
        '3,000 1/2',
    'and/or w/ b&w Mr. Smith\'s U.S. flag.': 'and/or w / b & w mr. smith \'s u.s. flag',
    'He said "hello" and \'bye\' and `x` -- then left...': 'he said hello and bye and x then left',
    "the dogs' bowls; rock 'n' roll o'clock y'all 'em ma'am 1990's '90s":
        "the dogs bowls rock 'n' roll o'clock y' all 'em ma'am 1990 's '90s",
    'two people,one dog ;see: a [b] {c}': 'two people one dog see a -lsb- b -rsb- -lcb- c -rcb-',
    'A cat on a mat.A dog': 'a cat on a mat.a dog',
    'St. Louis vs. the no. 5 street sign.': 'st. louis vs. the no. 5 street sign',
    'caf\u00e9 \u2014 em \u2013 en \u2026 \u201cquote\u201d \u2018single\u2019 it\u2019s':
        "caf\u00e9 em en quote single it 's",
    '20-foot 3D 4x4 1st 1.5 .5 -5 +5 a+b 5*6': '20-foot 3d 4x4 1st 1.5 .5 -5 +5 a + b 5 * 6',
    'A man , riding a wave . A   woman.\n': 'a man riding a wave a woman',
    ' . ': '',
    # Letters with marks of their own: Hindi, Tamil, Bengali, Telugu, Gujarati, Thai, Arabic,
    # Hebrew.
    'एक लाल गाड़ी सड़क पर है।': 'एक लाल गाड़ी सड़क पर है ।',
    'தமிழ் மொழி ஒரு நாய்': 'தமிழ் மொழி ஒரு நாய்',
    'কুকুর একটি বল': 'কুকুর একটি বল', 'తెలుగు భాష': 'తెలుగు భాష', 'ગુજરાતી': 'ગુજરાતી',
    'แมวสีแดง ภาษาไทย': 'แมวสีแดง ภาษาไทย', 'مَرْحَبًا كلب أحمر.': 'مَرْحَبًا كلب أحمر',
    'שָׁלוֹם כלב': 'שָׁלוֹם כלב', 'नमस्\u200dते': 'नमस् ते', 'می\u200cخواهم': 'می خواهم',
    'cafe\u0301 a\u0300 co\u0302te\u0301, nai\u0308ve':
        'cafe\u0301 a\u0300 co\u0302te\u0301 nai\u0308ve',
    "\u0130stanbul'da \u0131\u015f\u0131k": 'i\u0307stanbul da \u0131\u015f\u0131k',
    "L'homme n'est pas \u00e0 l'\u00e9t\u00e9, c'est s'il pleut qu'il aujourd'hui j'ai":
        "l'homme n'est pas \u00e0 l'\u00e9t\u00e9 c'est s il pleut qu'il aujourd hui j' ai",
    '\u00ab chien \u00bb dell\'arte': 'chien dell arte', 'a \U0001f600 dog': 'a dog',
    '一只红色的狗，跑。': '一只红色的狗 ， 跑 。', 'so\u00adft': 'soft'}


@pytest.mark.parametrize('text', TREEBANK)
def test_words_are_split_as_coco_caption_splits_them(text):
  assert ' '.join(captioning.tokenize(text)) == TREEBANK[text]


# Stanford's program drops marks of these scripts, which splits words.
@pytest.mark.parametrize('text', [
    'ಕನ್ನಡ ಭಾಷೆ', 'മലയാളം ഭാഷ', 'ਪੰਜਾਬੀ', 'ភាសាខ្មែរ', 'မြန်မာ', 'සිංහල'])
def test_words_of_other_scripts_stay_whole(text):
  assert captioning.tokenize(text) == text.split()


def test_captions_without_a_common_word_score_nothing(monkeypatch):
  monkeypatch.setattr(captioning, 'meteor', lambda *_: None)
  truth = [['एक लाल गाड़ी सड़क पर है'], ['दो काले कुत्ते पानी में हैं'],
           ['एक महिला किताब पढ़ रही है']]
  wrong = ['नीली नाव किनारे खड़ी', 'सफ़ेद बिल्ली कुर्सी नीचे', 'तीन बच्चे गेंद खेलते']
  scores = captioning.caption_scores(wrong, truth)
  assert all(score < 1e-6 for score in scores.values()), scores


def test_no_caption_is_never_right(monkeypatch):
  """Empty captions, as written from NaN logits, against references without words."""
  monkeypatch.setattr(captioning, 'meteor', lambda *_: None)
  scores = captioning.caption_scores(['', ''], [['...'], ['?', '!']])
  assert all(score < 1e-5 for score in scores.values()), scores


def written(rng, least=1):
  return ' '.join(rng.choices(WORDS, k=rng.randint(least, 11)))


def pictures(seed, count):
  """Captions (some empty, some right, some one word short), with one to five references each."""
  rng = random.Random(seed)
  references = [[written(rng) for _ in range(rng.randint(1, 5))] for _ in range(count)]
  captions = [rng.choice([written(rng, 0), rng.choice(texts), texts[0].rpartition(' ')[0]])
              for texts in references]
  return captions, references


def official(captions, references):
  pytest.importorskip('pycocoevalcap', reason='pip install .[test] brings the official code')
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge
  known = dict(enumerate(references))
  found = {i: [text] for i, text in enumerate(captions)}
  scores = {f'BLEU-{n}': score for n, score in enumerate(
      Bleu(4).compute_score(known, found, verbose=0)[0], 1)}
  for name, kind in (('ROUGE-L', Rouge), ('CIDEr', Cider)):
    scores[name] = kind().compute_score(known, found)[0]
  return scores


@pytest.mark.parametrize('seed, count', [(0, 1), (1, 2), (2, 7), (3, 80)])
def test_scores_are_those_of_the_official_code(seed, count, monkeypatch):
  monkeypatch.setattr(captioning, 'meteor', lambda *_: None)
  captions, references = pictures(seed, count)
  ours = captioning.caption_scores(captions, references)
  for name, score in official(captions, references).items():
    assert ours[name] == pytest.approx(score, rel=1e-9, abs=1e-12), name


def test_scores_of_a_known_case(monkeypatch):
  """Recorded scores of the official code, for machines without it."""
  monkeypatch.setattr(captioning, 'meteor', lambda *_: None)
  ours = captioning.caption_scores(*pictures(3, 80))
  wanted = {'BLEU-1': 0.7499327125860795, 'BLEU-2': 0.6649364240375791,
            'BLEU-3': 0.6310079831410167, 'BLEU-4': 0.6122919566029495,
            'ROUGE-L': 0.6646796346104704, 'CIDEr': 2.4210957362639176}
  assert {name: ours[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)


def test_case_and_punctuation_do_not_count(monkeypatch):
  monkeypatch.setattr(captioning, 'meteor', lambda *_: None)
  scores = captioning.caption_scores(
      ['A red square.', 'the dog', 'a cat'], [['a red square'], ['a dog', 'The dog!'], ['a dog']])
  assert scores['exact'] == pytest.approx(2 / 3)
  assert captioning.caption_scores(['A red square.'], [['a  red square']])['BLEU-1'] == (
      pytest.approx(1))


def test_meteor_is_that_of_its_java_program():
  pytest.importorskip('pycocoevalcap', reason='pip install .[test] brings the official code')
  if not shutil.which('java'):
    pytest.skip('METEOR is a Java program')
  score = captioning.meteor([['a', 'dog', 'runs']], [[['a', 'dog', 'is', 'running'], ['x']]])
  # Output of java -jar meteor-1.5.jar -l en -norm -r 2 on these lines.
  assert score == pytest.approx(0.31239469345701887)


def test_without_java_there_is_no_meteor(monkeypatch):
  monkeypatch.setattr(shutil, 'which', lambda name: None)
  scores = captioning.caption_scores(*pictures(0, 3))
  assert 'METEOR' not in scores and 'CIDEr' in scores


@pytest.mark.parametrize('captions, references', [
    ([], []), (['a'], [['a'], ['b']]), (['a', 'b'], [['a'], []])])
def test_what_cannot_be_scored_is_an_error(captions, references):
  with pytest.raises(ValueError, match='a reference or more'):
    captioning.caption_scores(captions, references)
