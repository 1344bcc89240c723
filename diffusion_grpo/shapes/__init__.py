"""The embedded world: scenes, their renderer and captions, a tokenizer, and an exact verifier."""
