"""The networks in Flax NNX, with the names that Diffusers and Transformers give them."""
