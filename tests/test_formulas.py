"""Every formula against a derivation of its own in float64; `docs/formulas.md` is this table.

`python tests/test_formulas.py` prints it with the errors of this machine.
"""

import math
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import integrate
from scipy.stats import norm

from diffusion_grpo.advantages import (
    RewardHistory,
    discounts,
    group_advantages,
    running_advantages,
    weighted_advantages,
)
from diffusion_grpo.gaussian import gaussian_entropy, gaussian_kl, gaussian_log_prob
from diffusion_grpo.grpo import (
    adapted_beta,
    clipped_surrogate,
    guarded_log_ratio,
    kl_estimate,
    masked_surrogate,
    scaled_clip,
)
from diffusion_grpo.learning_sections import OptimConfig
from diffusion_grpo.nft import nft_losses
from diffusion_grpo.optim import learning_rate
from diffusion_grpo.schedule import (
    SchedulerConfig,
    make_schedule,
    step_distribution,
    step_sensitivity,
)
from diffusion_grpo.steps import clip_scale, step_weights
from diffusion_grpo.trajectories import step_kl

RNG = np.random.default_rng(0)
X, Y, Z = (RNG.normal(size=(6, 4, 4, 2)) for _ in range(3))
REWARDS = RNG.normal(5, 2, 24).round(2)
DELTA = np.linspace(-0.5, 0.5, 41)
SIGNS = np.where(np.arange(41) % 2, 0.7, -1.3)
FIELDS: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": False,
    "clip_sample": False,
}
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
STEPS = 10


def f32(x):
    return jnp.asarray(x, jnp.float32)


def error(ours, theirs):
    """Largest difference, relative to the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def schedule(prediction="v_prediction"):
    return make_schedule(SchedulerConfig(**FIELDS, prediction_type=prediction), STEPS, eta=1.0)


def ddim(i, x, output, prediction, eta=1.0):
    """(μ, σ) of step i in float64."""
    t = 999 - 100 * i
    a, b = ABAR[t], ABAR[t - 100] if t >= 100 else ABAR[0]
    if prediction == "epsilon":
        e, x0 = output, (x - np.sqrt(1 - a) * output) / np.sqrt(a)
    else:
        e, x0 = np.sqrt(a) * output + np.sqrt(1 - a) * x, np.sqrt(a) * x - np.sqrt(1 - a) * output
    std = eta * np.sqrt((1 - b) / (1 - a)) * np.sqrt(1 - a / b)
    return np.sqrt(b) * x0 + np.sqrt(1 - b - std**2) * e, std


def mean_of_step():
    worst = 0.0
    for prediction in ("epsilon", "v_prediction"):
        for i in range(STEPS - 1):
            ours = step_distribution(schedule(prediction), i, f32(X), f32(Y))
            want = ddim(i, X.astype(np.float32), Y.astype(np.float32), prediction)
            worst = max(worst, error(ours[0], want[0]), error(ours[1], want[1]))
    return worst


def log_prob():
    worst = 0.0
    for how in ("mean", "sum"):
        ours = gaussian_log_prob(f32(X), f32(Y), 0.3, reduction=how)
        worst = max(worst, error(ours, getattr(norm.logpdf(X, Y, 0.3), how)((1, 2, 3))))
    return worst


def exact_kl():
    p, q, std = 0.4, -0.3, 0.6

    def density(x):
        return norm.pdf(x, p, std) * (norm.logpdf(x, p, std) - norm.logpdf(x, q, std))

    want = integrate.quad(density, -9, 9)[0]
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    return error(gaussian_kl(p * one, q * one, std, reduction="sum"), [want])


def kl_of_two_scales():
    p, q, s, t = 0.4, -0.3, 0.6, 0.9

    def density(x):
        return norm.pdf(x, p, s) * (norm.logpdf(x, p, s) - norm.logpdf(x, q, t))

    want = integrate.quad(density, -9, 9)[0]
    one = jnp.ones((1, 1, 1, 1), jnp.float32)
    return error(gaussian_kl(p * one, q * one, s, reduction="sum", std_q=t), [want])


def entropy():
    std = np.array([0.1, 0.7, 3.0])
    return error(gaussian_entropy(f32(std), 32, reduction="sum"), 32 * norm.entropy(0, std))


def group_kind(kind):
    def measure():
        groups = REWARDS.reshape(-1, 6)
        centered = groups - groups.mean(1, keepdims=True)
        want = {
            "group": centered / groups.std(1, keepdims=True),
            "group_mean": centered,
            "group_global_std": centered / REWARDS.std(),
            "leave_one_out": groups - (groups.sum(1, keepdims=True) - groups) / 5,
        }[kind]
        return error(group_advantages(f32(REWARDS), 6, kind=kind), want.ravel())

    return measure


def running():
    history, queue, worst = RewardHistory.empty(1, 8), deque(maxlen=8), 0.0
    for batch in REWARDS.reshape(-1, 6):
        ours, history = running_advantages(batch, np.zeros(6, int), history, min_count=1)
        queue.extend(batch.astype(np.float32).astype(np.float64))
        worst = max(worst, error(ours, (batch - np.mean(queue)) / np.std(queue)))
    return worst


def gdpo():
    a, b = REWARDS.reshape(-1, 6), 100 * REWARDS[::-1].reshape(-1, 6)
    want = sum(
        w * (r - r.mean(1, keepdims=True)) / r.std(1, keepdims=True) for w, r in ((2, a), (-1, b))
    )
    scores = {"a": f32(a.ravel()), "b": f32(b.ravel())}
    return error(weighted_advantages(scores, {"a": 2.0, "b": -1.0}, 6), want.ravel())


def discount():
    return error(discounts(0.97, 20), [0.97 ** (19 - i) for i in range(20)])


def surrogate(dual=None):
    def measure():
        x = torch.tensor(DELTA, requires_grad=True)
        a = torch.tensor(SIGNS)
        gain = torch.minimum(a * x.exp(), a * x.exp().clamp(0.8, 1.3))
        if dual is not None:
            gain = torch.where(a < 0, torch.maximum(gain, dual * a), gain)
        (-gain).sum().backward()

        def ours(x):
            return clipped_surrogate(
                x, f32(SIGNS), clip_low=0.2, clip_high=0.3, dual_clip=dual
            )[0]  # fmt: skip

        slope = jax.grad(lambda x: ours(x).sum())(f32(DELTA))
        assert x.grad is not None
        return max(error(ours(f32(DELTA)), -gain.detach()), error(slope, x.grad))

    return measure


def dppo():
    divergence = np.abs(DELTA)
    kept = ~((divergence > 0.2) & (SIGNS * (np.exp(DELTA) - 1) > 0))
    want = -SIGNS * np.exp(DELTA) * kept
    return error(masked_surrogate(f32(DELTA), f32(SIGNS), f32(divergence), limit=0.2)[0], want)


def guard():
    p, q, std = X, X + 0.1 * Y, 0.3  # new and old mean, a draw of the old
    draw = q + std * Z
    log_ratio = (norm.logpdf(draw, p, std) - norm.logpdf(draw, q, std)).mean((1, 2, 3))
    # (log ρ + ‖Δμ‖²/(2σ²)) σ is Δμ·z, of mean 0 under the old policy
    want = ((p - q) * Z).mean((1, 2, 3))
    divergence = gaussian_kl(f32(p), f32(q), std, reduction="mean")
    return error(guarded_log_ratio(f32(log_ratio), divergence, f32(std)), want)


def estimator(kind):
    def measure():
        worst = 0.0
        for elements in (1, 256):
            x = torch.tensor(DELTA, requires_grad=True)
            many = torch.tensor(elements)
            value = {"k1": x, "k2": many * x**2 / 2, "k3": many * ((-x).exp() - 1 + x)}[kind]
            value.sum().backward()
            slope = jax.grad(lambda x, n=elements: kl_estimate(x, kind, elements=n).sum())
            assert x.grad is not None
            found = kl_estimate(f32(DELTA), kind, elements=elements)
            worst = max(worst, error(found, value.detach()), error(slope(f32(DELTA)), x.grad))
        return worst

    return measure


def flow_grpo():
    i, worst = 3, 0.0
    for i in range(STEPS - 1):
        t = 999 - 100 * i
        tau, unit = [], []
        for a in (ABAR[t], ABAR[t - 100] if t >= 100 else ABAR[0]):
            unit.append(1 / (np.sqrt(a) + np.sqrt(1 - a)))
            tau.append(np.sqrt(1 - a) * unit[-1])
        std = ddim(i, X, Y, "v_prediction")[1]
        diffusion = unit[1] * std / np.sqrt(tau[0] - tau[1])  # σ_t of the flow's SDE
        want = (np.square(unit[1] * (X - Y)) / (2 * diffusion**2)).mean((1, 2, 3))
        steps = schedule()
        ours = step_kl(
            f32(X), steps.std[i], f32(Y), steps, jnp.int32(i), kind="flow_grpo", reduction="sum"
        )
        worst = max(worst, error(ours, want))
        # By the schedule's noise, also where the policy has one of its own.
        learned = step_kl(
            *(f32(X), 3 * steps.std[i], f32(Y), steps, jnp.int32(i)),
            **{"kind": "flow_grpo", "reduction": "sum", "learned_noise": True},
        )
        worst = max(worst, error(learned, want))
    return worst


def sensitivity():
    steps, worst = schedule(), 0.0
    for i in range(STEPS - 1):
        low, std = ddim(i, X, Y, "v_prediction")
        high, _ = ddim(i, X, Y + 1, "v_prediction")
        worst = max(worst, error(step_sensitivity(steps)[i], np.abs(high - low).mean() / std))
    return worst


def gain_weights():
    slopes = []
    for i in range(STEPS):
        (low, std), (high, _) = (ddim(i, X, Y + d, "v_prediction") for d in (0, 1))
        slopes.append(np.abs(high - low).mean() / std)
    want = np.mean(slopes[:-1]) / np.array(slopes[:-1])
    return error(step_weights(schedule(), "gain"), [*want, 0.0])


def clip_range():
    steps, ones = schedule(), jnp.ones(STEPS)
    scale = clip_scale(steps, ones, jnp.arange(STEPS), 256, ratio="trajectory", reduction="mean")
    low, high = scaled_clip(1e-3, 2e-3, scale)
    # √(16384/256) · √10 times as wide in log ρ
    factor = 8 * math.sqrt(10)
    return error([low, high], [1 - 0.999**factor, 1.002**factor - 1])


def controller():
    worst, beta = 0.0, 0.5
    for kl in (0.0, 0.019, 0.02, 0.0215, 0.5):
        worst = max(worst, error(adapted_beta(beta, kl, 0.02),
                                 beta * (1 + 0.1 * np.clip(kl / 0.02 - 1, -0.2, 0.2))))  # fmt: skip
    return worst


def nft():
    a, beta, most = np.linspace(-6, 6, 6), 0.5, 5.0
    x, old, x0 = torch.tensor(X, requires_grad=True), torch.tensor(Y), torch.tensor(Z)
    r = 0.5 + 0.5 * torch.clamp(torch.tensor(a) / most, -1, 1)
    total = torch.zeros(6)
    for weight, mix in ((r, beta * x + (1 - beta) * old), (1 - r, (1 + beta) * old - beta * x)):
        size = (mix.detach() - x0).abs().mean((1, 2, 3), keepdim=True)
        total = total + weight * ((mix - x0) ** 2 / size).mean((1, 2, 3)) * most / beta
    total.sum().backward()

    def ours(x):
        return nft_losses(x, f32(Y), f32(Z), f32(a), beta=beta, advantage_max=most)

    slope = jax.grad(lambda x: ours(x).sum())(f32(X))
    assert x.grad is not None
    return max(error(ours(f32(X)), total.detach()), error(slope, x.grad))


def cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20, 0.5)
    rate = learning_rate(
        OptimConfig(learning_rate=2.0, schedule="cosine", final_learning_rate=0.5), 20
    )
    ours, want = [], []
    for i in range(20):
        ours.append(float(rate(i)))
        want.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    return error(ours, want)


class Formula(NamedTuple):
    name: str
    formula: str
    option: str
    source: str
    oracle: str
    bound: float  # the largest relative error, rounded up
    measure: Any


FORMULAS = [
    Formula("denoising step", "μ = √ᾱ_s x̂₀ + √(1−ᾱ_s−σ²) ε̂, σ = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s)",
            "`rollout.eta`", "Song et al. 2021, eq. 12, 16", "NumPy", 3e-6, mean_of_step),
    Formula("log-prob of a step", "−(x−μ)²/(2σ²) − log σ − ½ log 2π, mean or sum over the latent",
            "`grpo.log_prob_reduction`", "Black et al. 2023", "SciPy", 5e-7, log_prob),
    Formula("entropy of a step", "log σ + ½ log 2πe an element", "`grpo.entropy_coeff`",
            "the normal distribution", "SciPy", 5e-7, entropy),
    Formula("advantage", "(r − mean)/std in the group", "`grpo.advantage group`",
            "Shao et al. 2024, 4.1", "NumPy", 5e-7, group_kind("group")),
    Formula("", "r − mean", "`grpo.advantage group_mean`", "Liu et al. 2025 (Dr. GRPO)", "NumPy",
            5e-7, group_kind("group_mean")),
    Formula("", "(r − mean)/std of the batch", "`grpo.advantage group_global_std`",
            "Liu et al. 2025 (Flow-GRPO)", "NumPy", 5e-7, group_kind("group_global_std")),
    Formula("", "r − mean of the others", "`grpo.advantage leave_one_out`",
            "Ahmadian et al. 2024", "NumPy", 5e-7, group_kind("leave_one_out")),
    Formula("", "(r − mean)/std of the prompt's last rewards", "`grpo.advantage running`",
            "Black et al. 2023", "NumPy", 5e-7, running),
    Formula("several rewards", "Σ_k w_k A_k", "`grpo.combine advantages`",
            "Liu et al. 2026 (GDPO)", "NumPy", 5e-7, gdpo),
    Formula("discount", "γ^(steps remaining) A", "`grpo.gamma`", "the definition", "Python", 3e-7,
            discount),
    Formula("clipped surrogate", "max(−A ρ, −A clip(ρ, 1−ε_low, 1+ε_high)), and its gradient",
            "`grpo.clip_low`, `grpo.clip_high`", "Schulman et al. 2017, eq. 7", "PyTorch", 5e-7,
            surrogate()),
    Formula("dual clip", "at most −A c where A < 0, and its gradient", "`grpo.dual_clip`",
            "Ye et al. 2020, eq. 5", "PyTorch", 5e-7, surrogate(1.2)),
    Formula("DPPO's mask", "−A ρ, dropped where KL > limit and A (ρ−1) > 0", "`grpo.dppo_kl`",
            "divergence PPO", "NumPy", 5e-7, dppo),
    Formula("GRPO-Guard's ratio", "exp((log ρ + ‖Δμ‖²/(2σ²)) σ)", "`grpo.guard`", "GRPO-Guard",
            "NumPy", 1e-6, guard),
    Formula("clip range", "(1 ± ε)^κ, κ = √(D₀/D) √(Σ w²s²/mean s²), × D for the sum",
            "`grpo.clip_scale`", "`steps.clip_scale`", "Python", 1e-12, clip_range),
    Formula("KL", "‖μ_θ−μ_ref‖²/(2σ²)", "`grpo.kl exact`", "the normal distribution",
            "SciPy quadrature", 5e-7, exact_kl),
    Formula("", "log(σ_ref/σ) + (σ²+Δμ²)/(2σ_ref²) − ½", "`grpo.learn_noise_scale`",
            "the normal distribution", "SciPy quadrature", 5e-7, kl_of_two_scales),
    Formula("", "δ = log π_θ − log π_ref, and its gradient", "`grpo.kl k1`", "Schulman 2020",
            "PyTorch", 5e-7, estimator("k1")),
    Formula("", "D δ²/2, and its gradient", "`grpo.kl k2`", "Schulman 2020", "PyTorch", 5e-7,
            estimator("k2")),
    Formula("", "D (e^(−δ) − 1 + δ), and its gradient", "`grpo.kl k3`", "Schulman 2020", "PyTorch",
            3e-6, estimator("k3")),
    Formula("", "mean‖Δμ‖²/(2σ_t²), σ_t the noise a unit of flow time", "`grpo.kl flow_grpo`",
            "Liu et al. 2025 (Flow-GRPO)", "NumPy, on the straight path", 1e-5, flow_grpo),
    Formula("adaptive β", "β (1 + 0.1 clip((KL−target)/target, ±0.2))", "`grpo.kl_target`",
            "Ziegler et al. 2019, 2.2", "NumPy", 1e-12, controller),
    Formula("sensitivity of a step", "|∂μ/∂output|/σ", "", "`schedule.step_sensitivity`",
            "finite difference", 5e-6, sensitivity),
    Formula("gain weights", "mean(s)/s_t but for the last step", "`grpo.step_weights gain`",
            "`steps.step_weights`", "finite difference", 2e-6, gain_weights),
    Formula("DiffusionNFT", "(A_max/β)(r ‖x̂⁺−x₀‖²/|x̂⁺−x₀| + (1−r) ‖x̂⁻−x₀‖²/|x̂⁻−x₀|), "
            "and its gradient", "`grpo.algorithm nft`", "Zheng et al. 2025", "PyTorch", 1e-6, nft),
    Formula("cosine learning rate", "f + (p − f) ½ (1 + cos πi/n)", "`optim.schedule cosine`",
            "Loshchilov & Hutter 2017, eq. 5", "PyTorch", 5e-7, cosine),
]  # fmt: skip

HEAD = """# Formulas

Each formula as it is computed (in float32) against a derivation of its own in float64, by another
library or by hand: the largest difference over a set of inputs, relative to the largest value. A
test measures it and keeps this table; `python tests/test_formulas.py` prints it with the errors of
your machine.

What is summed over steps and differentiated (ratios over a trajectory, a few of the steps, every KL
and correction in the loss) is compared with the whole loss written in one piece, by autodiff, in
`tests/test_update.py`; DiffusionNFT's minimum with the closed form on Gaussian data, for v-, ε- and
x₀-prediction, in `tests/test_nft.py`.

Log-probs, and with them δ, and KLs are means over the D elements of a latent unless
`grpo.log_prob_reduction` is `sum`; the factor D of k2 and k3 is 1 then. A KL in the loss is summed
over the steps, which `grpo.step_weights` do not weigh; that of `flow_grpo` is their mean.

With `grpo.ratio trajectory` an image has one ρ, log ρ = Σ_t w_t (log π_θ − log π_old) over the
steps learned from. With `grpo.ratio step` each of these steps has a ρ and a surrogate, and the
loss is the mean over them of w_t times the surrogate. In the clip range D₀ is 64·64·4, s is the
sensitivity of a step, and the sum and the mean are over the steps of a ratio: for `step` κ is
√(D₀/D), and GRPO-Guard's is smaller, as its exponents are.

In DiffusionNFT r = clip(½ + A/(2 A_max), 0, 1), x̂± = x̂_old ± β (x̂ − x̂_old), A_max is
`grpo.advantage_clip` and β `nft.beta`; squares and absolute values are means over the latent, the
latter without a gradient, and the loss is the mean over the timesteps of an image. For ε-prediction
its errors are multiplied by √ᾱ_t, unlike in the paper, where they have no bound.

"""


def table(errors):
    lines = [
        "| | formula | option | source | compared with | largest error |",
        "|---|---|---|---|---|---|",
    ]
    for formula, shown in zip(FORMULAS, errors, strict=True):
        cells = (formula.name, formula.formula.replace("|", "\\|"), formula.option, formula.source)
        lines.append("| " + " | ".join((*cells, formula.oracle, shown)) + " |")
    return HEAD + "\n".join(lines) + "\n"


@pytest.mark.parametrize("formula", FORMULAS, ids=lambda f: f.option or f.name)
def test_formula_is_within_its_error(formula):
    measured = formula.measure()
    assert measured <= formula.bound
    assert math.isfinite(measured)


def test_the_documented_table_is_this_one():
    path = Path(__file__).parents[1] / "docs" / "formulas.md"
    assert path.read_text(encoding="utf-8") == table([f"≤ {f.bound:.0e}" for f in FORMULAS])


if __name__ == "__main__":
    print(table([f"{formula.measure():.1e}" for formula in FORMULAS]))
