"""`python -m softteacher`, and so `torchrun -m softteacher train ...`."""

from softteacher.cli import main

main()
