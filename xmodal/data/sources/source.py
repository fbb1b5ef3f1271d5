"""The registry of data sources.

A source is a function (root, split, **options) -> Source: root is config.data.root, and options are
those it declares, values of config.data. It raises UserError where the files cannot be used.

    @SOURCES.register('csv', options={'delimiter': Option(',', 'Between the fields.')})
    def read_csv(root, split, delimiter): ...

Facts:
  boxes: true where files hold boxes; training on a split of which nothing is left is refused.
  embedded: true where it needs no files: the function is (split, *, train, image_size, **options).
"""

from xmodal.registry import Registry

SOURCES = Registry('source', 'config.data.source', 'xmodal.data.sources', 'xmodal.data.scenes')
