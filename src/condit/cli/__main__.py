"""`python -m condit.cli`, as accelerate starts it."""

from condit.cli import main

main()
