"""`python -m lsmha_fast` is `lsmha`."""

import sys

from .cli import main

sys.exit(main())
