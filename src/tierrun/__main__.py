"""`python -m tierrun` is the command line."""

from tierrun.tools.cli import main

main()
