"""`python -m saemill`."""

from saemill.cli import main

main()
