"""`python -m ipo_ext.demo`, the same as `python -m ipo_ext demo`."""

import sys

from . import main

sys.exit(main())
