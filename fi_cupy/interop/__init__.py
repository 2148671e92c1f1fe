"""fi_cupy inside other frameworks: `jax` (jit), `torch` (compile), `transformers`. Imported by users only."""
