"""Chain speculative sampling: many draft tokens verified at once. Public as ``sampling.chain_speculative_sampling``."""

from __future__ import annotations

from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import FLOAT_TYPES, INDEX_TYPES, int32, int64
from fi_cupy.errors import LayoutError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.sampling_kernels import launch_shape, room, speculative_spec
from fi_cupy.sampling_launch import ALIGNED_IN, INDICES64, NEW_ACCEPTED, NEW_EMITTED, Random, check_vocab


def chain_speculative_sampling(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    maybe_output_accepted_token_num: Any = None,
    maybe_output_emitted_draft_token_num: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    seed: Any = None,
    offset: Any = None,
) -> tuple[Any, Any, Any]:
    """Speculative sampling over a chain of draft tokens: the emitted tokens are distributed as the target's.

    Draft token i is accepted if ``u_i * draft_probs[i, token] < target_probs[i, token]``. The first rejected position
    draws from ``max(target - draft, 0)``, and if none is rejected, position n from the target.

    Parameters
    ----------
    draft_probs : array, [batch, n, vocab], float32, float16 or bfloat16
        Contiguous.
    draft_token_ids : array, [batch, n], int32 or int64
        Contiguous; an id outside the vocabulary is rejected.
    target_probs : array, [batch, n + 1, vocab], dtype of `draft_probs`
        Contiguous.
    maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num : array, [batch], int32, optional
        Counters that are *added to*; without them, new ones start from 0.
    deterministic, generator, seed, offset
        As in `sampling_from_logits`.

    Returns
    -------
    ids : array, [batch, n + 1], dtype of `draft_token_ids`
        The accepted tokens, one drawn token, then -1.
    accepted : array, [batch], int32
        Positions whose own test passes, also behind the first rejected one.
    emitted : array, [batch], int32
        Draft tokens in `ids`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ArgumentError, ImmutableArrayError, UnsupportedError

    Source
    ------
    Leviathan et al. 2023 (arXiv:2211.17192); flashinfer.sampling.chain_speculative_sampling.
    """
    op = "chain_speculative_sampling"
    q, ids, p = (
        view(draft_probs, op, "draft_probs"),
        view(draft_token_ids, op, "draft_token_ids"),
        view(target_probs, op, "target_probs"),
    )
    _check(op, q, ids, p)
    batch, n, vocab = q.shape
    accepted = _counter(op, "maybe_output_accepted_token_num", maybe_output_accepted_token_num, q, batch)
    emitted = _counter(op, "maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num, q, batch)
    new = (maybe_output_accepted_token_num is None, maybe_output_emitted_draft_token_num is None)
    random = Random(op, q, batch, seed, offset, generator)
    out = q.empty((batch, n + 1), ids.dtype)
    if q.is_cpu:
        tokens, more_accepted, more_emitted = reference.sampling.chain_speculative_sampling(
            q.numpy(), ids.numpy(), p.numpy(), random.seed, random.offset
        )
        out.write(tokens)
        accepted.write(more_accepted if new[0] else accepted.numpy() + more_accepted)
        emitted.write(more_emitted if new[1] else emitted.numpy() + more_emitted)
    else:
        row_bytes = vocab * q.dtype.itemsize
        aligned = q.ptr % 16 == 0 and p.ptr % 16 == 0 and row_bytes % 16 == 0
        shape = launch_shape("speculative", batch, vocab, device_info(q.device))
        load_kernel(speculative_spec(q.dtype, room(vocab), shape), q.device).launch(
            batch * shape.cluster, q.stream(),
            q.ptr, ids.ptr, p.ptr, out.ptr, accepted.ptr, emitted.ptr, random.seed_ptr, random.offset_ptr,
            random.seed_value, random.offset_value, n, vocab,
            random.flags | (INDICES64 if ids.dtype is int64 else 0) | (ALIGNED_IN if aligned else 0)
            | (NEW_ACCEPTED if new[0] else 0) | (NEW_EMITTED if new[1] else 0),
        )  # fmt: skip
    return out.result(), accepted.result(), emitted.result()


def _check(op: str, q: View, ids: View, p: View) -> None:
    check_ndim(op, "draft_probs", q, 3)
    check_dtype(op, "draft_probs", q, FLOAT_TYPES)
    batch, n, vocab = q.shape
    check_shape(op, "draft_token_ids", ids, (batch, n), "= draft_probs.shape[:2]")
    check_dtype(op, "draft_token_ids", ids, INDEX_TYPES)
    check_shape(op, "target_probs", p, (batch, n + 1, vocab), "= (batch, n + 1, vocab) of draft_probs")
    check_dtype(op, "target_probs", p, (q.dtype,), "like draft_probs")
    check_device(op, q, draft_token_ids=ids, target_probs=p)
    for name, x in (("draft_probs", q), ("draft_token_ids", ids), ("target_probs", p)):
        if not x.contiguous:
            raise LayoutError(f"{op}: {name} has strides {x.strides}, expected a contiguous array")
    check_vocab(op, "draft_probs", q)


def _counter(op: str, name: str, given: Any, like: View, batch: int) -> View:
    """A counter: the caller's, which is added to, or a new one, which is written."""
    if given is None:
        return like.empty((batch,), int32)
    c = view(given, op, name).writable(op, name)
    check_shape(op, name, c, (batch,), "= draft_probs.shape[:1]")
    check_dtype(op, name, c, (int32,))
    check_inner(op, name, c)
    check_device(op, like, **{name: c})
    return c
