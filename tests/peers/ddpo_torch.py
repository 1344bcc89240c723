"""One iteration of policy-gradient fine-tuning in PyTorch, for `diffusion-grpo bench --against`.

A DDPO-style loop (Black et al. 2023) over Diffusers' UNet2DConditionModel: sample with log-probs,
decode, score, then one backward pass for every step of every microbatch, and one optimizer step.
It does the work that it is told on standard input, with random weights: shapes, dtype, steps,
guidance, adapter and microbatches are ours, and so is the number of UNet evaluations. What PyTorch
does best is on: channels-last convolutions, fused attention and AdamW, TF32, cuDNN's search.
"""

from __future__ import annotations

import copy
import json
import os
import re
import sys
import time
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
spec = json.loads(sys.stdin.readline())
if spec["device"] == "cpu":
    os.environ["OMP_NUM_THREADS"] = str(spec["threads"])

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # noqa: E402
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel  # noqa: E402
from torch import nn  # noqa: E402

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LoRALinear(nn.Module):
    """A linear layer with a low-rank adapter, whose factors are float32."""

    enabled = True

    def __init__(self, base: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        place = base.weight.device
        self.a = nn.Parameter(torch.randn(base.in_features, rank, device=place) / rank)
        self.b = nn.Parameter(torch.zeros(rank, base.out_features, device=place))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base(x)
        if not LoRALinear.enabled:
            return out
        return out + (x @ self.a.to(x.dtype) @ self.b.to(x.dtype)) * self.scale


def attach(unet: nn.Module, targets: list[str], rank: int, alpha: float) -> None:
    patterns = [re.compile(rf"(^|\.)(?:{target})$") for target in targets]
    names = [name for name, layer in unet.named_modules() if any(p.search(name) for p in patterns)]
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = unet.get_submodule(parent)
        layer = owner._modules[last]
        if not isinstance(layer, nn.Linear):
            raise SystemExit(f"adapters of {type(layer).__name__} ({name}) are not known here")
        owner._modules[last] = LoRALinear(layer, rank, alpha)


def build(kind: Any, config: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    known = {k: v for k, v in config.items() if v is not None}
    with torch.device(device):
        module = kind(**known)
    return module.to(device, dtype, memory_format=torch.channels_last)


class Loop:
    """The iteration, and what it keeps."""

    def __init__(self) -> None:
        self.device = spec["device"]
        self.dtype = DTYPES[spec["model"]["dtype"]]
        full = spec["model"]["trainable"] == "full"
        self.unet = build(
            UNet2DConditionModel, spec["unet"], self.device, torch.float32 if full else self.dtype
        )
        self.unet.train()
        if spec["model"]["gradient_checkpointing"]:
            self.unet.enable_gradient_checkpointing()
        if not full:
            self.unet.requires_grad_(False)
            model = spec["model"]
            attach(self.unet, model["lora_targets"], model["lora_rank"], model["lora_alpha"])
        self.autocast = full and self.dtype != torch.float32
        self.reference = None  # with an adapter, the same network without it
        if full and spec["beta"]:
            self.reference = copy.deepcopy(self.unet).requires_grad_(False)
        self.vae = build(AutoencoderKL, spec["vae"], self.device, self.dtype).requires_grad_(False)
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        optim = spec["optim"]
        self.optimizer = torch.optim.AdamW(
            trained,
            lr=optim["learning_rate"],
            betas=(optim["beta1"], optim["beta2"]),
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            fused=True,
        )
        self.trained, self.max_norm = trained, optim["max_grad_norm"]
        self.run, self.run_reference, self.decode = self.unet, self.reference, self.vae.decode
        if spec["mode"] == "compiled":
            self.run = torch.compile(self.unet)
            self.run_reference = None if self.reference is None else torch.compile(self.reference)
            self.decode = torch.compile(self.vae.decode)
        n, d = spec["text_states"]
        self.text = torch.randn(spec["images"], n, d, device=self.device, dtype=self.dtype)
        self.negative = torch.randn(1, n, d, device=self.device, dtype=self.dtype)
        h, w, c = spec["latent"]
        self.latent = (c, h, w)
        self.schedule = {
            name: torch.tensor(values, device=self.device)
            for name, values in spec["schedule"].items()
        }
        self.std = spec["schedule"]["std"]

    def predict(self, network: Any, x: torch.Tensor, i: int, rows: Any) -> torch.Tensor:
        """The guided output, float32."""
        text, t = self.text[rows], self.schedule["timesteps"][i]
        scale, count = spec["guidance_scale"], len(x)
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if scale > 1:  # up to 1 there is no guidance, as in Diffusers
            x, text = torch.cat([x, x]), torch.cat([self.negative.expand_as(text), text])
        with torch.autocast(self.device, self.dtype, enabled=self.autocast):
            out = network(x, t, encoder_hidden_states=text, return_dict=False)[0]
        out = out.float()
        if scale > 1:
            plain, prompted = out[:count], out[count:]
            out = plain + scale * (prompted - plain)
        return out

    def mean(self, network: Any, x: torch.Tensor, i: int, rows: Any) -> torch.Tensor:
        """The mean of the step from x (DDIM-eta)."""
        out, s = self.predict(network, x, i, rows), self.schedule
        signal, noise = s["signal_scale"][i], s["noise_scale"][i]
        if spec["prediction_type"] == "epsilon":
            eps, x0 = out, (x - noise * out) / signal
        else:
            eps, x0 = signal * out + noise * x, signal * x - noise * out
        return s["next_signal_scale"][i] * x0 + s["direction_scale"][i] * eps

    def log_prob(self, x: torch.Tensor, mean: torch.Tensor, i: int) -> torch.Tensor:
        std = self.schedule["std"][i]
        value = -((x - mean) ** 2) / (2 * std**2) - std.log() - 0.9189385332046727
        return value.mean(dim=(1, 2, 3))

    @torch.no_grad()
    def sample(self) -> tuple[list[torch.Tensor], dict[int, torch.Tensor], torch.Tensor]:
        """Latents of every step, log-probs of those with noise, and pictures scored."""
        size, steps = spec["microbatch"], len(self.std)
        parts: list[list[torch.Tensor]] = []
        probs: list[dict[int, torch.Tensor]] = []
        rewards = []
        for start in range(0, spec["images"], size):
            rows = slice(start, start + size)
            x = torch.randn(size, *self.latent, device=self.device)
            x = x.contiguous(memory_format=torch.channels_last)
            latents, of_steps = [x], {}
            for i in range(steps):
                mean = self.mean(self.run, x, i, rows)
                if self.std[i] > 0:
                    x = mean + self.schedule["std"][i] * torch.randn_like(mean)
                    of_steps[i] = self.log_prob(x, mean, i)
                else:
                    x = mean
                latents.append(x)
            parts.append(latents)
            probs.append(of_steps)
            rewards.append(self.score(x))
        joined = [torch.cat(xs) for xs in zip(*parts, strict=True)]
        log_probs = {i: torch.cat([of[i] for of in probs]) for i in probs[0]}
        return joined, log_probs, torch.cat(rewards)

    def score(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode to 8 bits and take the brightness."""
        x = (latents / spec["vae"]["scaling_factor"]).to(self.dtype)
        images = self.decode(x, return_dict=False)[0].float()
        levels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        luma = torch.tensor([0.2126, 0.7152, 0.0722], device=levels.device)
        return (levels.float().mean(dim=(2, 3)) / 255) @ luma

    @torch.no_grad()
    def reference_means(self, latents: list[torch.Tensor], parts: Any) -> dict[int, torch.Tensor]:
        network = self.run if self.run_reference is None else self.run_reference
        LoRALinear.enabled = False
        means = {}
        for i in spec["active"]:
            means[i] = torch.cat([self.mean(network, latents[i][r], i, r) for r in parts])
        LoRALinear.enabled = True
        return means

    def update(self, latents: list[torch.Tensor], old: dict[int, Any], rewards: Any) -> None:
        groups = rewards.view(-1, spec["group_size"])
        spread = groups.std(dim=1, unbiased=False, keepdim=True) + 1e-8
        advantages = ((groups - groups.mean(dim=1, keepdim=True)) / spread).view(-1)
        count, extremes, chosen = len(advantages), spec["best_and_worst"], None
        if extremes is not None:
            order = advantages.view(groups.shape).argsort(dim=1)
            places = torch.cat([order[:, :extremes], order[:, -extremes:]], dim=1)
            firsts = torch.arange(len(groups), device=self.device)[:, None] * groups.shape[1]
            chosen = (firsts + places).view(-1)
            count = len(chosen)

        def parts(size: int) -> list[Any]:  # slices where all are learned from: no copy
            cuts = [slice(start, start + size) for start in range(0, count, size)]
            return cuts if chosen is None else [chosen[cut] for cut in cuts]

        means = self.reference_means(latents, parts(spec["microbatch"])) if spec["beta"] else {}
        size, clip = spec["update_microbatch"], spec["clip"]
        share = len(spec["active"]) / len(spec["steps"])
        for start, rows in zip(range(0, count, size), parts(size), strict=True):
            part = slice(start, start + size)
            gain = advantages[rows]
            for i in spec["steps"]:
                mean = self.mean(self.run, latents[i][rows], i, rows)
                ratio = (self.log_prob(latents[i + 1][rows], mean, i) - old[i][rows]).exp()
                loss = -torch.minimum(gain * ratio, gain * ratio.clamp(1 - clip, 1 + clip)).sum()
                if spec["beta"]:
                    gap = F.mse_loss(mean, means[i][part], reduction="none").mean(dim=(1, 2, 3))
                    loss = loss + spec["beta"] * (gap / (2 * self.std[i] ** 2)).sum()
                (share * loss / count).backward()
        torch.nn.utils.clip_grad_norm_(self.trained, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def wait(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def iteration(self) -> dict[str, float]:
        began = self.wait()
        latents, log_probs, rewards = self.sample()
        sampled = self.wait()
        self.update(latents, log_probs, rewards)
        updated = self.wait()
        done = {
            "sample": sampled - began,
            "update": updated - sampled,
            "iteration": updated - began,
        }
        if self.device == "cuda":
            done["peak_memory"] = torch.cuda.max_memory_allocated()
        return done


def say(message: dict[str, Any]) -> None:
    print("@" + json.dumps(message), flush=True)


def main() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    if spec["device"] == "cpu":
        torch.set_num_threads(spec["threads"])
    loop = Loop()
    first = loop.iteration()
    loop.iteration()  # the compiled program's second call may still choose and allocate
    versions = {"torch": torch.__version__}
    say({"ready": {"first_call": first, "versions": versions}})
    for line in sys.stdin:
        if json.loads(line).get("do") == "iteration":
            say(loop.iteration())


if __name__ == "__main__":
    main()
