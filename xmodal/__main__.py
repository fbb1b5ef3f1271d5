"""The command `xmodal` where it is not installed: python -m xmodal."""

import sys

from xmodal.cli import main

if __name__ == '__main__':
  sys.exit(main())
