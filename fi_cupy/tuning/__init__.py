"""What the autotuner is made of; users come in through `fi_cupy.autotuner`.

- `types`: how an operator says what can be tuned (NumPy-free dataclasses and the `TunableRunner` protocol);
- `choice`: the question an operator asks on every call, "which kernel?", answered from a dictionary;
- `file`: choices on disk, shared between processes, used only on the machine and versions they were measured with;
- `timer`: how long a tactic takes, by replaying a CUDA graph over rotated inputs.
"""
