"""`python -m edgevl`, for where the command is not on the PATH."""

from edgevl.cli import main

main()
