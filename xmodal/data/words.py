"""Words of texts, as a learned tokenizer reads them: lower case, each punctuation mark a word."""

from tokenizers import normalizers, pre_tokenizers

NORMALIZER = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
# Punctuation is split off; a mark before each word tells the decoder where spaces belong.
PRE_TOKENIZER = pre_tokenizers.Sequence([
    pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])

_MOST_KNOWN = 1 << 20  # parts of texts whose words are kept


class Words:
  """Numbers the words of texts in the order in which they first occur.

  Attributes:
    words: the words so far.
  """

  def __init__(self):
    self.words: list[str] = []
    self._numbers: dict[str, int] = {}
    self._known: dict[str, list[int]] = {}

  def numbers(self, text: str) -> list[int]:
    """The numbers of a text's words."""
    # Single spaces divide such a text into parts that are read alone.
    if not text.isascii() or '  ' in text or text[:1] == ' ' or text[-1:] == ' ':
      return self._split(text)
    known, found = self._known, []
    for part in text.split(' '):
      if (of_part := known.get(part)) is None:
        if len(known) >= _MOST_KNOWN:
          known.clear()
        of_part = known[part] = self._split(part)
      found += of_part
    return found

  def _split(self, text):
    found = []
    for word, _ in PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text)):
      if (number := self._numbers.setdefault(word, len(self.words))) == len(self.words):
        self.words.append(word)
      found.append(number)
    return found
