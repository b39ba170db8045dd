"""`python -m penstock`, which is also what torchrun starts."""

from penstock.cli import main

main()
