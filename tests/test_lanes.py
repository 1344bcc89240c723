"""Programs that run at the same time: the same results, in order, compiled once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations

from diffusion_grpo import lanes as module
from diffusion_grpo.accumulation import sum_in_lanes
from diffusion_grpo.lanes import Lanes, lanes
from diffusion_grpo.mesh import AXES


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 2)


def test_one_lane_a_core_on_a_cpu_and_one_where_a_mesh_divides_the_work(monkeypatch):
    assert lanes() == 2
    monkeypatch.setattr(module, "cores", lambda: 64)
    assert lanes() == module.MOST
    monkeypatch.setattr(module, "shards", lambda: 2)
    assert lanes() == 1
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert lanes() == 1


def test_calls_overlap_once_the_first_has_compiled():
    both = threading.Barrier(2, timeout=30)
    seen = []

    def call(i):
        seen.append((i, threading.current_thread() is threading.main_thread()))
        if i:  # passes only if the other is running too
            both.wait()
        return jnp.float32(i)

    found = list(Lanes().run([lambda i=i: call(i) for i in range(5)]))
    assert found == [0, 1, 2, 3, 4]
    assert seen[0] == (0, True)
    assert sorted(seen[1:]) == [(i, False) for i in range(1, 5)]


def test_a_program_is_compiled_once_under_the_callers_settings():
    @jax.jit
    def program(x):
        return x * jnp.ones(3, jnp.bfloat16)  # an error under strict promotion

    mesh = jax.make_mesh((1, 1), AXES, devices=jax.devices()[:1])
    own = Lanes()
    with jax.numpy_dtype_promotion("standard"), jax.set_mesh(mesh):
        inputs = [jnp.full(3, float(i)) for i in range(6)]
        for programs in (1, 0):
            with compilations() as compiled:
                found = list(own.run([lambda x=x: program(x) for x in inputs]))
            np.testing.assert_array_equal(np.stack(found)[:, 0], np.arange(6))
            assert compiled.count("program") == programs, compiled


def test_a_call_that_fails_raises_and_the_rest_is_left():
    ran = []

    def call(i):
        ran.append(i)
        if i == 1:
            raise ValueError("of call 1")
        return jnp.float32(i)

    found = []
    with pytest.raises(ValueError, match="of call 1"):
        for value in Lanes().run([lambda i=i: call(i) for i in range(100)]):
            found.append(float(value))
    assert found == [0.0]
    assert len(ran) < 100


@pytest.mark.parametrize("number", [1, 2, 3])
def test_gradients_of_lanes_sum_to_that_of_one(monkeypatch, number):
    monkeypatch.setattr(module, "cores", lambda: number)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(10, 4)), rng.normal(size=4)
    # ∇ ½ Σ (x·w)² = Σ (x·w) x, by NumPy in float64
    expected = ((x @ w)[:, None] * x).sum(axis=0)
    rows, weights = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    gradient = jax.jit(jax.grad(lambda w, x: 0.5 * jnp.square(x @ w).sum()))

    def add(total, start):
        new = gradient(weights, rows[start : start + 2])
        return jax.tree.map(jnp.add, total, {"w": new}), [{"rows": jnp.float32(2)}]

    own = Lanes()
    found = [sum_in_lanes(own, add, lambda: {"w": jnp.zeros(4)}, range(0, 10, 2)) for _ in range(3)]
    for total, history in found:
        np.testing.assert_allclose(total["w"], expected, rtol=1e-5)
        np.testing.assert_array_equal(total["w"], found[0][0]["w"])  # to the bit
        assert sum(float(metrics["rows"]) for metrics in history) == 10
