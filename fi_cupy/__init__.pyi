from . import (
    activation as activation,
    api_logging as api_logging,
    aot as aot,
    artifacts as artifacts,
    attention as attention,
    autotuner as autotuner,
    batch_attention as batch_attention,
    cascade as cascade,
    cascade_attention as cascade_attention,
    compilation_context as compilation_context,
    cuda_utils as cuda_utils,
    customize as customize,
    decode as decode,
    dtypes as dtypes,
    errors as errors,
    fused_moe as fused_moe,
    gemm as gemm,
    interop as interop,
    jit as jit,
    logits_processor as logits_processor,
    lookup as lookup,
    mla as mla,
    norm as norm,
    page as page,
    pod as pod,
    prefill as prefill,
    profiles as profiles,
    quantization as quantization,
    reference as reference,
    rope as rope,
    sampling as sampling,
    topk as topk,
    sparse as sparse,
    testing as testing,
    utils as utils,
    variants as variants,
)
from .activation import (
    gelu_and_mul as gelu_and_mul,
    gelu_tanh_and_mul as gelu_tanh_and_mul,
    silu_and_mul as silu_and_mul,
    silu_and_mul_quant as silu_and_mul_quant,
)
from .attention import (
    BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper,
)
from .autotuner import (
    autotune as autotune,
)
from .batch_attention import (
    BatchAttention as BatchAttention,
)
from .cascade import (
    merge_state as merge_state,
    merge_state_in_place as merge_state_in_place,
    merge_states as merge_states,
)
from .cascade_attention import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper as BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper as BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper as MultiLevelCascadeAttentionWrapper,
)
from .decode import (
    BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper,
    BatchDecodeWrapper as BatchDecodeWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    fast_decode_plan as fast_decode_plan,
    single_decode_with_kv_cache as single_decode_with_kv_cache,
)
from .fused_moe import (
    ActivationType as ActivationType,
    cutlass_fused_moe as cutlass_fused_moe,
    fused_topk_deepseek as fused_topk_deepseek,
)
from .gemm import (
    SegmentGEMMWrapper as SegmentGEMMWrapper,
    batch_deepgemm_fp8_nt_groupwise as batch_deepgemm_fp8_nt_groupwise,
    bmm_bf16 as bmm_bf16,
    bmm_fp8 as bmm_fp8,
    fp8_blockscale_gemm_sm90 as fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled as gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise as gemm_fp8_nt_groupwise,
    group_deepgemm_fp8_nt_groupwise as group_deepgemm_fp8_nt_groupwise,
    group_gemm as group_gemm,
    group_gemm_fp8_nt_groupwise as group_gemm_fp8_nt_groupwise,
    mm_bf16 as mm_bf16,
    mm_bf16_swiglu as mm_bf16_swiglu,
    mm_fp8 as mm_fp8,
)
from .mla import (
    BatchDecodeMlaWithPagedKVCacheWrapper as BatchDecodeMlaWithPagedKVCacheWrapper,
    BatchMLAPagedAttentionWrapper as BatchMLAPagedAttentionWrapper,
)
from .norm import (
    fused_add_rmsnorm as fused_add_rmsnorm,
    fused_add_rmsnorm_quant as fused_add_rmsnorm_quant,
    gemma_fused_add_rmsnorm as gemma_fused_add_rmsnorm,
    gemma_rmsnorm as gemma_rmsnorm,
    layernorm as layernorm,
    layernorm_quant as layernorm_quant,
    rmsnorm as rmsnorm,
    rmsnorm_quant as rmsnorm_quant,
)
from .page import (
    append_paged_kv_cache as append_paged_kv_cache,
    append_paged_mla_kv_cache as append_paged_mla_kv_cache,
    get_batch_indices_positions as get_batch_indices_positions,
    get_seq_lens as get_seq_lens,
)
from .pod import (
    PODWithPagedKVCacheWrapper as PODWithPagedKVCacheWrapper,
)
from .prefill import (
    BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache as single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse,
)
from .profiles import (
    preload as preload,
)
from .quantization import (
    SfLayout as SfLayout,
    block_scale_interleave as block_scale_interleave,
    e2m1_and_ufp8sf_scale_to_float as e2m1_and_ufp8sf_scale_to_float,
    fp4_quantize as fp4_quantize,
    mxfp4_dequantize as mxfp4_dequantize,
    mxfp4_quantize as mxfp4_quantize,
    mxfp8_dequantize_host as mxfp8_dequantize_host,
    mxfp8_quantize as mxfp8_quantize,
    nvfp4_block_scale_interleave as nvfp4_block_scale_interleave,
    nvfp4_quantize as nvfp4_quantize,
    packbits as packbits,
    per_token_group_quant_8bit as per_token_group_quant_8bit,
    segment_packbits as segment_packbits,
    silu_and_mul_nvfp4_quantize as silu_and_mul_nvfp4_quantize,
)
from .rope import (
    apply_llama31_rope as apply_llama31_rope,
    apply_llama31_rope_inplace as apply_llama31_rope_inplace,
    apply_llama31_rope_pos_ids as apply_llama31_rope_pos_ids,
    apply_llama31_rope_pos_ids_inplace as apply_llama31_rope_pos_ids_inplace,
    apply_rope as apply_rope,
    apply_rope_inplace as apply_rope_inplace,
    apply_rope_pos_ids as apply_rope_pos_ids,
    apply_rope_pos_ids_inplace as apply_rope_pos_ids_inplace,
    apply_rope_with_cos_sin_cache as apply_rope_with_cos_sin_cache,
    apply_rope_with_cos_sin_cache_inplace as apply_rope_with_cos_sin_cache_inplace,
    mla_rope_quantize_fp8 as mla_rope_quantize_fp8,
    rope_append_paged_kv_cache as rope_append_paged_kv_cache,
    rope_quantize_fp8 as rope_quantize_fp8,
    rope_quantize_fp8_append_paged_kv_cache as rope_quantize_fp8_append_paged_kv_cache,
)
from .sampling import (
    chain_speculative_sampling as chain_speculative_sampling,
    min_p_sampling_from_probs as min_p_sampling_from_probs,
    sampling_from_logits as sampling_from_logits,
    sampling_from_probs as sampling_from_probs,
    softmax as softmax,
    top_k_mask_logits as top_k_mask_logits,
    top_k_renorm_prob as top_k_renorm_prob,
    top_k_renorm_probs as top_k_renorm_probs,
    top_k_sampling_from_probs as top_k_sampling_from_probs,
    top_k_top_p_sampling_from_logits as top_k_top_p_sampling_from_logits,
    top_k_top_p_sampling_from_probs as top_k_top_p_sampling_from_probs,
    top_p_renorm_prob as top_p_renorm_prob,
    top_p_renorm_probs as top_p_renorm_probs,
    top_p_sampling_from_probs as top_p_sampling_from_probs,
)
from .sparse import (
    BlockSparseAttentionWrapper as BlockSparseAttentionWrapper,
    VariableBlockSparseAttentionWrapper as VariableBlockSparseAttentionWrapper,
    convert_bsr_mask_layout as convert_bsr_mask_layout,
)
from .topk import (
    TopKTieBreak as TopKTieBreak,
    top_k as top_k,
    top_k_page_table_transform as top_k_page_table_transform,
    top_k_ragged_transform as top_k_ragged_transform,
)

__version__: str
