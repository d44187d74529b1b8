"""``python -m dpfast`` is the command ``dpfast``; torchrun starts it this way."""

import sys

from dpfast.cli.main import main

sys.exit(main())
