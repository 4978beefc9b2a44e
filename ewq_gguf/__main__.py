"""`python -m ewq_gguf`."""

import sys

from ewq_gguf.cli import main

sys.exit(main())
