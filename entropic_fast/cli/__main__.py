"""`python -m entropic_fast.cli`."""

from . import main

main()
