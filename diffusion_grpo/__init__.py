"""Fine-tune text-to-image diffusion models toward any reward with GRPO, in JAX."""

__version__ = "0.1.0"
