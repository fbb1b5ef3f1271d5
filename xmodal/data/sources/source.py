"""The registry of data sources.

A source is a function (root, split, **options) -> Source: root is config.data.root; options are
the values in config.data of the options it declares. It raises UserError if the files cannot be
used.

    @SOURCES.register('csv', options={'delimiter': Option(',', 'Between the fields.')})
    def read_csv(root, split, delimiter): ...

Facts:
  boxes: true if files hold boxes; a training split without any usable box is then an error.
  named: true if config.data.name may stand for config.data.root.
  splits: function (root, **options) that names the splits there are; without it, `xmodal check`
    looks for train, val and test.
  embedded: true if it needs no files; the function is then
    (split, *, train, image_size, **options) -> Source.
"""

from xmodal.registry import Registry

SOURCES = Registry('source', 'config.data.source', 'xmodal.data.sources', 'xmodal.data.scenes')
