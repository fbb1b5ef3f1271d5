"""The model card of a bundle."""


def card(predictor, about, stored, workdir):
  return ''
