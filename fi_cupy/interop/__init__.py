"""fi_cupy inside other frameworks' compilers; each module is imported by who uses that framework.

* ``fi_cupy.interop.jax``: every operator and wrapper inside ``jax.jit``.
* ``fi_cupy.interop.torch``: the same as custom operators for ``torch.compile``.
* ``fi_cupy.interop.transformers``: `register`, for ``attn_implementation="fi_cupy"``.
"""
