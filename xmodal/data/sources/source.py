"""The registry of data sources.

A source is a function (root, split, **options) -> Source: root is config.data.root; options are
the values in config.data of the options it declares. It raises UserError if the files cannot be
used.

    @SOURCES.register('pairs', options={'separator': Option('|', 'Between the fields.')})
    def read_pairs(root, split, separator): ...

Facts:
  boxes: true if files hold boxes; a training split without any usable box is then an error.
  named: true if config.data.name may stand for config.data.root.
  splits: function (root, **options) that names the splits there are; without it, `xmodal check`
    and `xmodal pack` look for train, val and test.
  embedded: true if it needs no files; the function is then
    (split, *, train, image_size, **options) -> Source.
"""

from xmodal.registry import Registry

SOURCES = Registry('source', 'config.data.source', 'xmodal.data.sources', 'xmodal.data.scenes')
