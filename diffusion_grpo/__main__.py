"""The command as a process: `diffusion-grpo`, or `python -m diffusion_grpo`."""

import sys

from diffusion_grpo.heap import start_with_huge_pages
from diffusion_grpo.virtual_devices import give_threads

# Those that run networks; to start once more would only delay the others.
COMPUTING = (
    *("train", "sample", "compare", "evaluate", "bench"),
    *("score", "check-reward", "serve-reward"),
)


def run() -> None:
    """Run the command line, and exit with its code."""
    if sys.argv[1:2] and sys.argv[1] in COMPUTING:
        give_threads()
        start_with_huge_pages()
    from diffusion_grpo.cli import main

    sys.exit(main())


if __name__ == "__main__":
    run()
