"""Tokens a second of a whole model: SmolLM2-135M-Instruct, greedy, 128 new tokens for each of 1, 8 and 64 requests."""

from __future__ import annotations

import io

from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, BenchSkip, host_case

PROMPT = "Once upon a time, in a village at the edge of a great forest, there lived"
NEW_TOKENS = 128
#: Requests at once -> the recorded rows beside it.
RECORDED = {
    1: ["SmolLM2-135M decode, 1 stream, eager", "SmolLM2-135M decode, 1 stream, static cache + compile"],
    64: ["SmolLM2-135M decode, 64 streams, eager", "SmolLM2-135M decode, 64 streams, static cache + compile"],
}


def _tokens_per_second(batch: int) -> float:
    """Decode speed over all requests; loading, compiling and capturing are not in it."""
    from fi_cupy.models import ModelError
    from fi_cupy.models.generate import run_generate

    try:
        stats = run_generate(PROMPT, max_tokens=NEW_TOKENS, batch=batch, backend="cuda", stream=io.StringIO())
    except (ImportError, ModelError) as error:
        raise BenchSkip(f"the model cannot be loaded: {error}") from error
    if stats.decode_tokens < batch * NEW_TOKENS // 2:
        raise RuntimeError(f"only {stats.decode_tokens} tokens were decoded, expected near {batch * NEW_TOKENS}")
    return stats.decode_tokens_per_second


def cases(device: DeviceInfo) -> list[BenchCase]:
    """One stream, a small batch, a full batch."""
    return [
        host_case(
            f"SmolLM2-135M decode, {batch} stream{'s' * (batch > 1)}",
            lambda batch=batch: _tokens_per_second(batch),
            unit="tokens/s",
            recorded=RECORDED.get(batch, ()),
        )
        for batch in (1, 8, 64)
    ]
