"""How much of what a model has learned is guidance: its change along the guidance of its base.

    python benchmarks/guidance_direction.py shapes-diffusion runs/demo

With e the network's output for a noisy latent, of the base without and with the prompt and of the
tuned model with it, g = e_base(prompt) − e_base() is what classifier-free guidance adds s − 1 times
and d = e_tuned(prompt) − e_base(prompt) what training has added. Given are their cosine, over all
latents of a timestep together, and d·g/g·g, the guidance that training amounts to along g. Latents
are the base's own pictures, drawn with --guidance-scale and noised again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion_grpo.conditioning import encode_prompts
from diffusion_grpo.pipeline import TrainablePolicy, latent_shape, make_solved
from diffusion_grpo.pretrained import StableDiffusion
from diffusion_grpo.prompts import load_prompts
from diffusion_grpo.run_models import find_model
from diffusion_grpo.samplers import make_solver
from diffusion_grpo.schedule import add_noise, alphas_cumprod


class Change(NamedTuple):
    """What a model does otherwise at one timestep, along the guidance of its base."""

    timestep: int
    cosine: float
    guidance: float


def along(d: Float[np.ndarray, "..."], g: Float[np.ndarray, "..."]) -> tuple[float, float]:
    """Return the cosine of d and g, 0 where d is 0, and d·g/g·g."""
    d, g = d.astype(np.float64).ravel(), g.astype(np.float64).ravel()
    size = np.linalg.norm(d) * np.linalg.norm(g)
    return float(d @ g / size) if size else 0.0, float(d @ g / (g @ g))


def measure(
    model: StableDiffusion,
    tuned: TrainablePolicy,
    texts: Sequence[str],
    *,
    timesteps: Sequence[int],
    guidance_scale: float = 2.0,
    num_steps: int = 20,
) -> list[Change]:
    """Compare a tuned network with its base.

    Args:
        model: the base, and what encodes the prompts of both.
        tuned: the tuned one.
        texts: prompts, a latent each.
        timesteps: where.
        guidance_scale: of the pictures.
        num_steps: of DDIM, for the pictures.
    """
    base, guided = (TrainablePolicy(model.unet, scale) for scale in (1.0, guidance_scale))
    prompts, negative = encode_prompts(model, texts)
    nothing = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(texts), *x.shape[1:])), negative)
    noise, draws = jax.random.split(jax.random.key(0))
    start = jax.random.normal(noise, (len(texts), *latent_shape(model)))
    pictures, _ = make_solved(guided.structure)(
        guided.trained,
        guided.frozen,
        make_solver(model.scheduler_config, "ddim", num_steps),
        start,
        jax.random.split(draws, len(texts)),
        (prompts, negative),
    )

    def compiled(policy: TrainablePolicy) -> Callable[..., np.ndarray]:
        @jax.jit
        def output(trained: Any, frozen: Any, *arguments: Any) -> Any:
            return policy.denoiser(trained, frozen)(*arguments)

        return lambda *arguments: np.asarray(output(policy.trained, policy.frozen, *arguments))

    plain, changed = compiled(base), compiled(tuned)
    table, found = alphas_cumprod(model.scheduler_config), []
    for timestep in timesteps:
        drawn = jax.random.normal(jax.random.fold_in(noise, timestep), pictures.shape)
        x = add_noise(table, pictures, drawn, jnp.full(len(texts), timestep))
        without, before, after = (
            output(x, jnp.int32(timestep), (conditioning, negative))
            for output, conditioning in ((plain, nothing), (plain, prompts), (changed, prompts))
        )
        found.append(Change(timestep, *along(after - before, before - without)))
    return found


def main() -> None:
    """Parse the command line, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a checkpoint, or RUN@base")
    parser.add_argument("tuned", nargs="+", help="checkpoints or runs of the same networks")
    parser.add_argument("--prompts", default="shapes_heldout")
    parser.add_argument("--num-prompts", type=int, default=60, help="spread over the list")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="of the pictures")
    parser.add_argument("--timesteps", type=int, nargs="+", default=[100, 300, 500, 700, 900])
    options = parser.parse_args()

    def load(word: str) -> StableDiffusion:
        place, revision, variant = find_model(word)
        return StableDiffusion.from_pretrained(place, revision=revision, variant=variant)

    base, listed = load(options.base), load_prompts(options.prompts)
    places = np.linspace(0, len(listed), options.num_prompts, endpoint=False).astype(int)
    texts = [listed[int(place)].text for place in places]
    width = max(map(len, ("timestep", *options.tuned)))
    print(f"{'timestep':<{width}}{''.join(f'{t:>16}' for t in options.timesteps)}")
    for word in options.tuned:
        tuned = TrainablePolicy(load(word).unet, 1.0)
        scale, timesteps = options.guidance_scale, options.timesteps
        changes = measure(base, tuned, texts, timesteps=timesteps, guidance_scale=scale)
        cells = [f"{change.cosine:.2f} ({change.guidance:+.2f})" for change in changes]
        print(f"{word:<{width}}{''.join(f'{cell:>16}' for cell in cells)}")


if __name__ == "__main__":
    main()
