"""The programs that an iteration repeats are given nothing that is still on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import config
from torch_checkpoints import TWO_LEVELS, write_pipeline

from diffusion_grpo import train as run
from diffusion_grpo.learning import GRPOLearner, NFTLearner
from diffusion_grpo.pipeline import make_decoder
from diffusion_grpo.pretrained import StableDiffusion

NFT = {"grpo__algorithm": "nft", "grpo__kl": "mse", "nft__timesteps": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("transfers") / "pipeline", **TWO_LEVELS)


def host(tree):
    """Return the tree with its arrays on the host, but for random keys: NumPy has none."""
    return jax.tree.map(
        lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(x), tree
    )


def test_latents_from_the_host_are_not_decoded(checkpoint):
    decode = make_decoder(StableDiffusion.from_pretrained(checkpoint))
    latents = np.zeros((1, 8, 8, 4), np.float32)
    assert decode(jax.device_put(latents)).shape == (1, 32, 32, 3)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        decode(latents)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", [GRPOLearner, NFTLearner])
@pytest.mark.parametrize("what", ["weights", "images"])
def test_an_iteration_does_not_bring_weights_or_images_from_the_host(
    checkpoint, tmp_path, monkeypatch, kind, what
):
    sample, learn = kind.sample, kind.learn

    def sample_with_weights_on_the_host(self, state, *arguments, **options):
        state = state._replace(train=state.train._replace(params=host(state.train.params)))
        old = None if state.old is None else host(state.old)
        return sample(self, state._replace(old=old), *arguments, **options)

    def learn_from_images_on_the_host(self, state, rollout, *arguments):
        return learn(self, state, rollout._replace(batch=host(rollout.batch)), *arguments)

    if what == "weights":
        monkeypatch.setattr(kind, "sample", sample_with_weights_on_the_host)
    else:
        monkeypatch.setattr(kind, "learn", learn_from_images_on_the_host)
    changed = {"run__iterations": 1} | (NFT if kind is NFTLearner else {})
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run.train(config(checkpoint, tmp_path, **changed), quiet=True)
