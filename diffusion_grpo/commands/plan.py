"""`diffusion-grpo plan`: will a run fit, and how fast would it be, on devices that are not here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from diffusion_grpo.errors import UsageError
from diffusion_grpo.output_files import check_output

HELP = """usage: diffusion-grpo plan [PRESET | config.yaml] [--section.field value ...]
                           [--device KIND] [--devices N] [--json FILE] [--quiet]

Memory, time and traffic of a run, without running it; no weights are read. Takes the
run's options as `train` does. --device: cpu (this machine, measured; the default),
{devices}.
--devices: how many, 1 by default, laid out by --mesh.data and --mesh.fsdp as in a run.
"""


def run(words: Sequence[str]) -> list[Path]:
    """Plan and print; returns what was written."""
    from diffusion_grpo.devices import DEVICES, find_device

    if "--help" in words or "-h" in words:
        print(HELP.format(devices=", ".join(DEVICES)))
        return []
    own, rest = _split(words)
    device_name = own.get("--device", "cpu")
    count = own.get("--devices", "1")
    if not count.isdigit() or not int(count):
        raise UsageError(f"devices is {count!r}; expected 1 or more")
    path = Path(own["--json"]) if "--json" in own else None
    if path is not None:
        path = check_output(path, (".json",))
    start = rest.pop(0) if rest and not rest[0].startswith("-") else None

    from diffusion_grpo.config import load_config
    from diffusion_grpo.fitting import fitted
    from diffusion_grpo.plan import USABLE, check_devices, make_plan, table
    from diffusion_grpo.published import find_architecture
    from diffusion_grpo.run_models import with_found_model

    config = with_found_model(load_config(start, rest, prog="diffusion-grpo plan"))
    device = find_device(device_name)
    model = find_architecture(config.model.pretrained, revision=config.model.revision)
    check_devices(config, int(count))
    config, notes = fitted(config, model, device, int(count))
    plan = make_plan(config, model, device, int(count))
    if "--quiet" not in own:
        print(f"{count} x {device_name}, {config.model.pretrained}")
        for note in notes:
            print(note)
        judges = [*config.training_rewards(), *config.gold_rewards()]
        table(plan, USABLE * device.memory, rewards=[reward.name for reward in judges])
    if path is None:
        return []
    record = dataclasses.asdict(plan) | {"peak": plan.peak, "device": device_name}
    record |= {
        "microbatch": config.rollout.microbatch,
        "update_microbatch": config.grpo.microbatch,
        "gradient_checkpointing": config.model.gradient_checkpointing,
    }
    path.write_text(json.dumps(record | {"devices": int(count)}, indent=1) + "\n", encoding="utf-8")
    return [path]


def _split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the command's own options from the run's."""
    own: dict[str, str] = {}
    rest, words = [], list(words)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        if name == "--quiet":
            own[name] = ""
        elif name in ("--device", "--devices", "--json"):
            if not equals and not words:
                raise UsageError(f"{name} needs a value")
            own[name] = value if equals else words.pop(0)
        else:
            rest.append(word)
    return own, rest
