"""`python -m diffusion_grpo`: the command line without its console script."""

import sys

from diffusion_grpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
