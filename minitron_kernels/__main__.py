"""`python -m minitron_kernels`: the `minitron` command, as torchrun starts it."""

import sys

from minitron_kernels.cli import main

sys.exit(main())
