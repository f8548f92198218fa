"""`python -m lesionflow` is the command."""

from lesionflow.cli import main

main()
