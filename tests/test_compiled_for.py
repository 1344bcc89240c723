"""What is read off a compiled GPU program: its kernels, their work, and how often they run."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from diffusion_grpo.devices import Device

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compiled_for.py"

# As XLA writes it: a loop of seven steps around a product and an elementwise kernel; a convolution
# and its gradient, and a kernel that is brought into another order before the loop.
HLO = """HloModule jit_f, is_scheduled=true

%fused_tanh (p: bf16[64,32]) -> bf16[64,32] {
  %p = bf16[64,32]{1,0} parameter(0)
  ROOT %t = bf16[64,32]{1,0} tanh(%p), metadata={op_name="jit(f)/tanh"}
}

%fused_sum (p.1: bf16[64,32]) -> f32[64] {
  %p.1 = bf16[64,32]{1,0} parameter(0)
  ROOT %r = f32[64]{0} reduce(%p.1), dimensions={1}
}

%fused_order (p.2: bf16[3,3,8,16]) -> bf16[16,3,3,8] {
  %p.2 = bf16[3,3,8,16]{3,2,1,0} parameter(0)
  ROOT %x = bf16[16,3,3,8]{3,2,1,0} transpose(%p.2), dimensions={3,0,1,2}
}

%body (state: (s32[], bf16[64,32], bf16[32,32])) -> (s32[], bf16[64,32], bf16[32,32]) {
  %state = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  %a = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[32,32]{1,0} get-tuple-element(%state), index=2
  %gemm = (bf16[64,32]{1,0}, s8[4]{0}) custom-call(%a, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %out = bf16[64,32]{1,0} get-tuple-element(%gemm), index=0
  %act = bf16[64,32]{1,0} fusion(%out), kind=kLoop, calls=%fused_tanh
  ROOT %next = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) tuple(%state, %act, %w)
}

ENTRY %main (x: bf16[64,32], y: bf16[2,4,4,8], k: bf16[3,3,8,16]) -> f32[64] {
  %x = bf16[64,32]{1,0} parameter(0)
  %y = bf16[2,4,4,8]{3,2,1,0} parameter(1)
  %k = bf16[3,3,8,16]{3,2,1,0} parameter(2)
  %order = bf16[16,3,3,8]{3,2,1,0} fusion(%k), kind=kInput, calls=%fused_order
  %conv = (bf16[2,4,4,16]{3,2,1,0}, u8[0]{0}) custom-call(%y, %order), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %conv.1 = bf16[2,4,4,16]{3,2,1,0} get-tuple-element(%conv), index=0
  %back = (bf16[2,4,4,8]{3,2,1,0}, u8[0]{0}) custom-call(%conv.1, %k), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convBackwardInput"
  %loop = (s32[], bf16[64,32]{1,0}, bf16[32,32]{1,0}) while(%x), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %last = bf16[64,32]{1,0} get-tuple-element(%loop), index=1
  ROOT %sum = f32[64]{0} fusion(%last), kind=kInput, calls=%fused_sum
}
"""  # noqa: E501


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compiled_for", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernels_have_their_work_and_loops_count_as_often_as_they_run(script):
    found = {(each.kind, each.times): each for each in script.kernels(HLO)}
    rows = {key: (each.flops, each.bytes) for key, each in found.items()}
    # 64 rows x 32 sums of 32 products; 4 bytes of workspace
    assert rows["gemm", 7] == (2 * 64 * 32 * 32, 2 * (64 * 32 + 32 * 32 + 64 * 32) + 4)
    assert rows["elementwise", 7] == (0, 2 * 2 * 64 * 32)
    assert rows["layout", 1] == (0, 2 * 2 * 3 * 3 * 8 * 16)
    assert rows["reduction", 1] == (0, 2 * 64 * 32 + 4 * 64)
    convolutions = [each for each in script.kernels(HLO) if each.kind == "convolution"]
    # Each of 2 x 4 x 4 pixels, 16 channels: 3 x 3 x 8 products; the gradient has the same ones.
    assert [each.flops for each in convolutions] == [2 * 2 * 16 * 16 * 9 * 8] * 2
    assert len(script.kernels(HLO)) == 6


def test_the_table_adds_a_kernels_own_time_to_its_roofline(script):
    device = Device(
        "gpu", 1e12, 1e12, 1e9, 1e9, 1e9, efficiency=0.5, bandwidth_efficiency=0.5, latency=1e-3
    )
    gemm = script.Kernel("gemm", 1e9, 1.0, 3, "a")  # 2 ms each by its products
    copy = script.Kernel("layout", 0.0, 1e6, 2, "b")  # 2 ms each by its bytes
    lines = script.table([gemm, copy], device).splitlines()
    assert lines[-1].split() == ["all", "5", "0.003", "0.00", "15.00"]
    assert [line.split()[-1] for line in lines[1:-1]] == ["6.00", "9.00"]


def test_communication_is_counted_by_kind(script):
    text = """
  %s = (f32[8], f32[8]) all-reduce-start(%a), to_apply=%add
  %d = f32[8] all-reduce-done(%s)
  %t = f32[] all-reduce(%b), to_apply=%add
  ROOT %g = f32[8,4] all-gather(%c), dimensions={0}, metadata={op_name="all-to-all"}
"""
    assert script.collectives(text) == "1 all-gather, 2 all-reduce"
    assert script.collectives(HLO) == "none"


def test_images_are_divided_and_parameters_are_not(script):
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"))
    shape = jax.ShapeDtypeStruct((3, 16, 8), jnp.float32)
    weights, latents, scalar = script.laid_out((shape, shape, jnp.float32(1)), 16, 1, mesh)
    assert weights.sharding.spec == PartitionSpec() and scalar.sharding.spec == PartitionSpec()
    assert latents.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    assert latents.shape == shape.shape and latents.sharding.mesh == mesh
