"""`python -m rwkvinside` is the `rwkvinside` command."""

import sys

from .cli import main

sys.exit(main())
