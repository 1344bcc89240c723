"""Train or resume the run of `tiny_run.py`, and be killed at one moment of it.

`python chaos_run.py CHECKPOINT FOLDER MOMENT ITERATION SIGNAL`: the signal is sent within the
moment (sampling, scoring, update or save) of an iteration; iteration -1 is never reached.
"""

import os
import sys
from pathlib import Path
from typing import Any

from tiny_run import flags

import diffusion_grpo.train as train
from diffusion_grpo.checkpoint import Checkpoints
from diffusion_grpo.cli import main
from diffusion_grpo.learning import GRPOLearner

ITERATIONS = 4


def disturb(moment: str, iteration: int, number: int) -> None:
    """Send the signal at the moment."""
    now = [0]

    def at(name: str) -> None:
        if name == moment and now[0] == iteration:
            os.kill(os.getpid(), number)

    sample, learn, save = GRPOLearner.sample, GRPOLearner.learn, Checkpoints.save
    advantages, decoded_and_scored = train.image_advantages, train.decoded_and_scored

    def sampled(self: Any, state: Any, iteration: int, *rest: Any, **options: Any) -> Any:
        now[0] = iteration
        return sample(self, state, iteration, *rest, **options)

    def scored(*arguments: Any) -> Any:
        output = decoded_and_scored(*arguments)

        def take(chunk: Any) -> None:
            at("sampling")  # the first images are there, others are being drawn
            output.take(chunk)

        return output._replace(take=take)

    def compared(*arguments: Any, **options: Any) -> Any:
        at("scoring")
        return advantages(*arguments, **options)

    def learned(*arguments: Any) -> Any:
        result = learn(*arguments)
        at("update")  # its programs are on their way, nothing of it is recorded
        return result

    def saved(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        at("save")  # the files are being written by other threads

    GRPOLearner.sample, GRPOLearner.learn, Checkpoints.save = sampled, learned, saved
    train.image_advantages, train.decoded_and_scored = compared, scored


if __name__ == "__main__":
    checkpoint, folder, moment, iteration, number = sys.argv[1:]
    disturb(moment, int(iteration), int(number))
    run = Path(folder) / "run"
    changed = {"run__iterations": ITERATIONS, "grpo__updates_per_rollout": 2}
    words = flags(Path(checkpoint), Path(folder), **changed)
    if (run / "config.yaml").is_file():
        words = ["--resume", str(run)]
    sys.exit(main(["train", *words]))
