"""`python -m condit.cli`, which accelerate and torchrun start."""

from condit.cli import main

main()
