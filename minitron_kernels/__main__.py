"""`python -m minitron_kernels`: the `minitron` command, as torchrun starts it."""

from minitron_kernels.cli import run_and_exit

run_and_exit()
