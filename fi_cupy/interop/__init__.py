"""fi_cupy inside other frameworks' machinery: `jax` (jit), `torch` (compile), `transformers`. Imported by users only."""
