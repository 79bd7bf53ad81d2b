"""`python -m minipuzzle`, and what torchrun starts."""

from minipuzzle.cli import main

main(prog_name="minipuzzle")
