"""`python -m rwkvinside` is the `rwkvinside` command."""

import sys

from .cli.main import main

sys.exit(main())
