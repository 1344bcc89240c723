"""Train the run of `tiny_run.py` on a mesh, and write down what its update sends between devices.

`python mesh_run.py CHECKPOINT FOLDER FIELD=VALUE …`, in a process of its own, since the number of
virtual devices is fixed as JAX starts. Leaves `FOLDER/communication.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
from communication import collectives
from tiny_run import flags

import diffusion_grpo.learning as learning
import diffusion_grpo.mesh as mesh
from diffusion_grpo.cli import main

FOUND: dict[str, Any] = {}


def recorded(name: str, program: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if name not in FOUND:
            text = program.lower(*arguments, **options).compile().as_text()
            FOUND[name] = collectives(text)
            if name == "accumulate":
                leaves = jax.tree.leaves(arguments[1])
                FOUND["gradient_bytes"] = sum(leaf.nbytes for leaf in leaves)
        return program(*arguments, **options)

    return call


def compile_loss(*arguments: Any, **options: Any) -> Any:
    loss = original(*arguments, **options)
    programs = {name: recorded(name, getattr(loss, name)) for name in ("terms", "accumulate")}
    return loss._replace(**programs)


original, learning.compile_loss = learning.compile_loss, compile_loss
mesh._total_of = recorded("total", mesh._total_of)
mesh._slice_rows = recorded("slice", mesh._slice_rows)
mesh._join_rows = recorded("join", mesh._join_rows)

if __name__ == "__main__":
    checkpoint, folder, *changed = sys.argv[1:]
    words = flags(Path(checkpoint), Path(folder), **dict(word.split("=", 1) for word in changed))
    code = main(["train", *words])
    (Path(folder) / "communication.json").write_text(json.dumps(FOUND))
    sys.exit(code)
