"""Starting a run as several processes, and ending all of them when one fails.

`--distributed` is about how a run is started and no part of what it is: it is not in `config.yaml`,
and a resumed run may have another number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diffusion_grpo.errors import UsageError, suggest

FLAG = "--distributed"
FAILED = "diffusion-grpo/failed"  # what the first process that failed has to say
SEEN = "diffusion-grpo/seen"  # which processes have read it
POLL_SECONDS = 0.5
LINGER_SECONDS = 10.0  # at most, until the others have read it

_ending = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Launch:
    """How this process finds the others.

    Attributes:
        coordinator_address: HOST:PORT of process 0; None leaves it to JAX, which knows SLURM,
            Kubernetes, Cloud TPU and Open MPI.
        num_processes: of the run; given with an address.
        process_id: which one this is, from 0; given with an address.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self) -> None:
        """Refuse a part of the three, and numbers that no launch can have."""
        values = dataclasses.asdict(self)
        missing = [_flag(name) for name, value in values.items() if value is None]
        if missing and len(missing) < len(values):
            raise UsageError(
                f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given; "
                f"expected all of {', '.join(map(_flag, values))}, or {FLAG} alone, where JAX "
                "finds the others by itself (SLURM, Kubernetes, Cloud TPU)"
            )
        if self.coordinator_address is None or self.num_processes is None:
            return
        host, _, port = self.coordinator_address.rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(
                f"{_flag('coordinator_address')} is {self.coordinator_address!r}; expected "
                "HOST:PORT of process 0, such as 10.0.0.1:1234"
            )
        if self.num_processes < 1:
            raise UsageError(
                f"{_flag('num_processes')} is {self.num_processes}; expected 1 or more"
            )
        if not 0 <= (self.process_id or 0) < self.num_processes:
            raise UsageError(
                f"{_flag('process_id')} is {self.process_id}; expected a number from 0 to "
                f"{self.num_processes - 1}, since {_flag('num_processes')} is {self.num_processes}"
            )


def _flag(name: str) -> str:
    return f"{FLAG}.{name.replace('_', '-')}"


def split_launch(words: Sequence[str]) -> tuple[Launch | None, list[str]]:
    """Take `--distributed` and its options out of a command line.

    Args:
        words: of `diffusion-grpo train`.

    Returns:
        How to find the other processes, or None for a process of its own; and the other words.

    Raises:
        UsageError: an option that does not exist, has no value, or a value of another kind.
    """
    kinds: dict[str, Callable[[str], Any]] = {
        "coordinator_address": str,
        "num_processes": int,
        "process_id": int,
    }
    names = {_flag(name): name for name in kinds}
    given: dict[str, Any] = {}
    rest: list[str] = []
    left = iter(words)
    asked = False
    for word in left:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag != FLAG and not flag.startswith(f"{FLAG}."):
            rest.append(word)
            continue
        asked = True
        if flag == FLAG:
            if equals:
                raise UsageError(f"{FLAG} takes no value, but {value!r} is given")
            continue
        if flag not in names:
            raise UsageError(
                f"unknown option {flag!r}{suggest(flag, names)}; expected {', '.join(names)}"
            )
        value = value if equals else next(left, "")
        name = names[flag]
        try:
            given[name] = kinds[name](value)
        except ValueError:
            raise UsageError(f"{flag} is {value!r}; expected a whole number") from None
    return (Launch(**given) if asked else None), rest


def start(launch: Launch) -> None:
    """Join the other processes; before anything asks JAX for devices.

    Raises:
        UsageError: JAX does not find them, or something has used a device already.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would swallow one that comes before the run has its own.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**dataclasses.asdict(launch))
    except (ValueError, RuntimeError) as error:
        address = launch.coordinator_address
        mend = (
            "is process 0 running, and does its address reach it from here?"
            if address
            else f"outside of SLURM, Kubernetes and Cloud TPU give {_flag('coordinator_address')}, "
            f"{_flag('num_processes')} and {_flag('process_id')}"
        )
        raise UsageError(
            f"{FLAG}: JAX cannot join the other processes"
            f"{f' at {address}' if address else ''}: {_first_line(error)}; {mend}"
        ) from error


@contextlib.contextmanager
def together(launch: Launch | None, exit_code: Callable[[BaseException], int]) -> Iterator[None]:
    """Join the other processes, and end with them: all go on to the end, or all stop.

    A process that fails tells the others why, and all of them end at once with its exit code. None
    waits for an end in order, for which it takes all.

    Args:
        launch: how to find them; None for a process of its own.
        exit_code: what an error means to the shell.
    """
    if launch is None:
        yield
        return
    start(launch)
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(done,), name="watcher", daemon=True)
    watcher.start()
    try:
        yield
        _leave(done)
    except SystemExit:  # --help
        done.set()
        raise
    except BaseException as error:
        done.set()
        _end_all(error, exit_code)


def _leave(done: threading.Event) -> None:
    """Leave in order, when all have come to the end."""
    import jax

    from diffusion_grpo.processes import wait_for_all

    wait_for_all("the end of the run")
    done.set()
    jax.distributed.shutdown()


def _end_all(error: BaseException, exit_code: Callable[[BaseException], int]) -> None:
    """Say why, to the user and to the other processes, and end this one."""
    from diffusion_grpo.processes import rank, service

    code, message = exit_code(error), str(error) or type(error).__name__
    client = service()
    # Another one's failure may be why this one failed; it needs a moment to tell.
    seconds = 3.0 if _by_another(error) else 0.0
    earlier = _report(client, {"process": rank(), "code": code, "message": message}, seconds)
    if earlier is not None:
        _follow(earlier)
    _claim()
    print(f"diffusion-grpo: process {rank()}: {message}", file=sys.stderr, flush=True)
    if code == 1 and not _mended_by_user(error):
        traceback.print_exception(error)
    _depart(code, failed=True)


def _report(client: Any, failure: dict[str, Any], seconds: float) -> dict[str, Any] | None:
    """Tell the others why this process fails; or return what one said that failed before."""
    with contextlib.suppress(Exception):  # process 0, with the service, may be gone
        found = _failure(client, seconds=seconds)
        if found is not None:
            return found
        try:
            client.key_value_set(FAILED, json.dumps(failure))
        except Exception:  # one was there first
            return _failure(client)
    return None


def _watch(done: threading.Event) -> None:
    """End this process when another one has failed."""
    from diffusion_grpo.processes import service

    client, lost = service(), 0
    while not done.wait(POLL_SECONDS):
        try:
            found = _failure(client)
            lost = 0
        except Exception as error:
            lost += 1
            if lost == 3 and not done.is_set():
                print(
                    "diffusion-grpo: process 0 does not answer any more, so this one ends: "
                    f"{_first_line(error)}",
                    file=sys.stderr,
                    flush=True,
                )
                _exit(1)
            continue
        if found is not None and not done.is_set():
            _follow(found)


def _failure(client: Any, *, seconds: float = 0.0) -> dict[str, Any] | None:
    """Return what the first process that failed has said, waiting for it a while; or None."""
    until = time.monotonic() + seconds
    while True:
        try:
            return json.loads(client.key_value_try_get(FAILED))
        except Exception as error:
            if "NOT_FOUND" not in str(error):
                raise
        if time.monotonic() >= until:
            return None
        time.sleep(0.1)


def _follow(failure: dict[str, Any]) -> None:
    """End as the process that failed does."""
    from diffusion_grpo.processes import rank

    _claim()
    if failure["process"] != rank():
        told = f"diffusion-grpo: ended, since process {failure['process']} did: "
        print(told + failure["message"], file=sys.stderr, flush=True)
    _depart(failure["code"], failed=False)


def _claim() -> None:
    """Let one thread of this process end it: the watcher, or the one that failed meanwhile."""
    if not _ending.acquire(blocking=False):
        threading.Event().wait()


def _depart(code: int, *, failed: bool) -> None:
    """End this process, in an order that lets every other one read why.

    The one that failed waits for the others, and process 0, with which the service goes that they
    ask, is the last.
    """
    from diffusion_grpo.processes import count, rank, service

    client, last = service(), rank() == 0
    with contextlib.suppress(Exception):
        if failed:
            _wait_for_seen(client, count() - 1)
        client.key_value_set(f"{SEEN}/{rank()}", "")
        if last:
            _wait_for_seen(client, count())
            time.sleep(1.0)  # they have said so, and are about to end
    _exit(code)


def _wait_for_seen(client: Any, number: int) -> None:
    until = time.monotonic() + LINGER_SECONDS
    while len(client.key_value_dir_get(f"{SEEN}/")) < number and time.monotonic() < until:
        time.sleep(0.1)


def _by_another(error: BaseException) -> bool:
    """Whether an error may be the echo of another process's end: of a collective, or a barrier."""
    import jax

    return isinstance(error, jax.errors.JaxRuntimeError)


def _mended_by_user(error: BaseException) -> bool:
    return type(error).__module__ == "diffusion_grpo.errors"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _exit(code: int) -> None:
    """End at once: an end in order waits for the other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
