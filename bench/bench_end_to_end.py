"""Tokens a second of a whole model: SmolLM2-135M-Instruct, 128 new tokens for each of 1, 8 and 64 requests."""

from __future__ import annotations

import io
from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, BenchSkip, host_case

PROMPT = "Once upon a time, in a village at the edge of a great forest, there lived"
NEW_TOKENS = 128
#: Requests at once -> the recorded rows beside it.
RECORDED = {
    1: ["SmolLM2-135M decode, 1 stream, eager", "SmolLM2-135M decode, 1 stream, static cache + compile"],
    64: ["SmolLM2-135M decode, 64 streams, eager", "SmolLM2-135M decode, 64 streams, static cache + compile"],
}


#: Name of a way of choosing tokens -> its parameters.
SAMPLED = {"sampled": {"temperature": 0.8, "top_p": 0.95}, "top-k 50": {"temperature": 0.8, "top_k": 50, "top_p": 0.95}}


def _tokens_per_second(batch: int, **options: Any) -> float:
    """Decode speed over all requests; loading, compiling and capturing are not in it."""
    from fi_cupy.models import ModelError
    from fi_cupy.models.generate import run_generate

    try:
        stats = run_generate(
            PROMPT, max_tokens=NEW_TOKENS, batch=batch, backend="cuda", ignore_eos=True, stream=io.StringIO(), **options
        )
    except (ImportError, ModelError) as error:
        raise BenchSkip(f"the model cannot be loaded: {error}") from error
    if stats.decode_tokens != batch * (NEW_TOKENS - 1):
        raise RuntimeError(f"{stats.decode_tokens} tokens were decoded, expected {batch * (NEW_TOKENS - 1)}")
    return stats.decode_tokens_per_second


def _case(batch: int, name: str, options: dict[str, Any]) -> BenchCase:
    return host_case(
        f"SmolLM2-135M decode, {batch} stream{'s' * (batch > 1)}{name and f', {name}'}",
        lambda: _tokens_per_second(batch, **options),
        unit="tokens/s",
        recorded=() if name else RECORDED.get(batch, ()),
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """One stream, a small batch, a full batch; and what drawing tokens costs."""
    greedy = [_case(batch, "", {}) for batch in (1, 8, 64)]
    return greedy + [_case(batch, name, options) for name, options in SAMPLED.items() for batch in (1, 64)]
