"""The command as a process: `diffusion-grpo`, or `python -m diffusion_grpo`."""

import sys

from diffusion_grpo.heap import start_with_huge_pages


def run() -> None:
    """Run the command line, and exit with its code."""
    start_with_huge_pages()
    from diffusion_grpo.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
