"""Fine-tune text-to-image diffusion models toward any reward with GRPO, in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_grpo.trainer import GRPOConfig, GRPOTrainer

__version__ = "0.1.0"
__all__ = ["GRPOConfig", "GRPOTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the trainer, and with it JAX, where it is first asked for."""
    if name in ("GRPOConfig", "GRPOTrainer"):
        from diffusion_grpo import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
