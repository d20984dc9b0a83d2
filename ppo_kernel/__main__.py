"""`python -m ppo_kernel` is `ppo-kernel`."""

from .cli import main

main()
