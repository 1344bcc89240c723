"""The command as a process: `diffusion-grpo`, or `python -m diffusion_grpo`."""

import os
import select
import sys

from diffusion_grpo.heap import start_with_huge_pages
from diffusion_grpo.virtual_devices import give_threads

# Those that run networks; to start once more would only delay the others.
COMPUTING = (
    *("train", "sample", "compare", "evaluate", "bench"),
    *("score", "check-reward", "serve-reward"),
)


def _nobody_reads(descriptor: int) -> bool:
    """Say whether the other end of a pipe is closed."""
    poller = select.poll()
    poller.register(descriptor, 0)  # errors are told unasked
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poller.poll(0))


def run() -> None:
    """Run the command line, and exit with its code.

    Where who reads the output has enough (`| head`), the command ends as by SIGPIPE, with 141.
    """
    if sys.argv[1:2] and sys.argv[1] in COMPUTING:
        give_threads()
        start_with_huge_pages()
    from diffusion_grpo.cli import main

    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):  # it was something else, such as a connection
            raise
        # At exit Python would try once more to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)


if __name__ == "__main__":
    run()
