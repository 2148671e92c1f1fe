"""Names, order and defaults of the public functions and wrappers: FlashInfer's, so that calls move over.

Every row lists the positional parameters in FlashInfer's order, then ``*`` and what it takes by keyword only. Ours may
have more keywords behind them, but no other positional parameter in between.
"""

from __future__ import annotations

import inspect

import pytest

import fi_cupy as flashinfer

P = inspect.Parameter
NO = P.empty

#: Options of a plan, FlashInfer's order differs between the paged and the ragged wrapper.
DECODE_PLAN = (
    "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode='NONE' window_left=-1 "
    "logits_soft_cap=None q_data_type='float16' kv_data_type=None o_data_type=None data_type=None sm_scale=None "
    "rope_scale=None rope_theta=None non_blocking=True block_tables=None seq_lens=None fixed_split_size=None "
    "disable_split_kv=False q_len_per_req=1 * window_right=0"
)
PAGED_PLAN = (
    "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk page_size "
    "head_dim_vo=None custom_mask=None packed_custom_mask=None causal=False pos_encoding_mode='NONE' "
    "use_fp16_qk_reduction=False sm_scale=None window_left=-1 logits_soft_cap=None rope_scale=None rope_theta=None "
    "q_data_type='float16' kv_data_type=None o_data_type=None non_blocking=True prefix_len_ptr=None "
    "token_pos_in_items_ptr=None token_pos_in_items_len=0 max_item_len_ptr=None seq_lens=None seq_lens_q=None "
    "block_tables=None max_token_per_sequence=None max_sequence_kv=None fixed_split_size=None disable_split_kv=False"
)
RAGGED_PLAN = (
    "qo_indptr kv_indptr num_qo_heads num_kv_heads head_dim_qk head_dim_vo=None custom_mask=None "
    "packed_custom_mask=None causal=False pos_encoding_mode='NONE' use_fp16_qk_reduction=False window_left=-1 "
    "logits_soft_cap=None sm_scale=None rope_scale=None rope_theta=None q_data_type='float16' kv_data_type=None "
    "o_data_type=None non_blocking=True prefix_len_ptr=None token_pos_in_items_ptr=None token_pos_in_items_len=0 "
    "max_item_len_ptr=None fixed_split_size=None disable_split_kv=False seq_lens=None seq_lens_q=None "
    "max_token_per_sequence=None max_sequence_kv=None v_indptr=None o_indptr=None"
)
PREFILL_BUFFERS = (
    "float_workspace_buffer kv_layout='NHD' use_cuda_graph=False qo_indptr_buf=None paged_kv_indptr_buf=None "
    "paged_kv_indices_buf=None paged_kv_last_page_len_buf=None custom_mask_buf=None mask_indptr_buf=None backend='auto'"
)
RUN = "* q_scale=None k_scale=None v_scale=None out=None lse=None return_lse=False enable_pdl=None"
SPARSE_FORWARD = (
    "q k v pos_encoding_mode='NONE' use_fp16_qk_reduction=False logits_soft_cap=None sm_scale=None rope_scale=None "
    "rope_theta=None"
)

ROPE_QUANTIZE = (
    "q_rope k_rope q_nope k_nope cos_sin_cache pos_ids is_neox=True quantize_dtype=None quant_scale_q=1.0 "
    "quant_scale_kv=1.0 q_rope_out=None k_rope_out=None q_nope_out=None k_nope_out=None enable_pdl=False"
)

DRAW = "indices=None deterministic=True generator=None check_nan=False seed=None offset=None return_valid=False"
BOTH_FILTERS = DRAW.replace("deterministic", "filter_apply_order='top_k_first' deterministic")
ROPE = "rotary_dim=None interleave=False rope_scale=1 rope_theta=10000.0"
LLAMA31_ROPE = (
    "rotary_dim=None interleave=False rope_scale=8 rope_theta=500000.0 low_freq_factor=1 high_freq_factor=4 "
    "old_context_len=8192"
)
MODULE_OPTIONS = "pos_encoding_mode=0 use_sliding_window=False use_logits_soft_cap=False"

SIGNATURES = {
    "sampling.softmax": "logits temperature=None enable_pdl=None",
    "sampling.sampling_from_logits": f"logits {DRAW}",
    "sampling.sampling_from_probs": f"probs {DRAW}",
    "sampling.top_p_sampling_from_probs": f"probs top_p {DRAW}",
    "sampling.top_k_sampling_from_probs": f"probs top_k {DRAW}",
    "sampling.min_p_sampling_from_probs": f"probs min_p {DRAW}",
    "sampling.top_k_top_p_sampling_from_logits": f"logits top_k top_p {BOTH_FILTERS}",
    "sampling.top_k_top_p_sampling_from_probs": f"probs top_k top_p {BOTH_FILTERS}",
    "sampling.top_p_renorm_probs": "probs top_p is_deterministic=False",
    "sampling.top_p_renorm_prob": "probs top_p is_deterministic=False",
    "sampling.top_k_renorm_probs": "probs top_k",
    "sampling.top_k_renorm_prob": "probs top_k",
    "sampling.top_k_mask_logits": "logits top_k",
    "sampling.chain_speculative_sampling": (
        "draft_probs draft_token_ids target_probs maybe_output_accepted_token_num=None "
        "maybe_output_emitted_draft_token_num=None deterministic=True generator=None seed=None offset=None"
    ),
    "sampling.get_seed_and_offset": "increment generator=None device=None",
    "topk.top_k": "input k sorted=False deterministic=False tie_break=0 dsa_graph_safe=False",
    "topk.top_k_page_table_transform": (
        "input src_page_table lengths k row_to_batch=None deterministic=False tie_break=0 dsa_graph_safe=False "
        "row_starts=None page_table_row_starts=None * page_size=1 out=None out_raw_indices=None"
    ),
    "topk.top_k_ragged_transform": (
        "input offsets lengths k deterministic=False tie_break=0 dsa_graph_safe=False row_starts=None * out=None"
    ),
    "logits_processor.LogitsPipe": (
        "processors compile=True input_type=None custom_fusion_rules=None custom_validity_checks=None"
    ),
    "logits_processor.Softmax": "enable_pdl=None",
    "logits_processor.TopK": "joint_topk_topp=False",
    "logits_processor.Sample": "deterministic=True",
    "logits_processor.LogitsProcessor.legalize": "input_type",
    "logits_processor.FusionRule": "pattern guard build prio=0",
    "logits_processor.compile_pipeline": "ops custom_fusion_rules=None custom_validity_checks=None",
    "norm.rmsnorm": "input weight eps=1e-06 out=None enable_pdl=None",
    "norm.gemma_rmsnorm": "input weight eps=1e-06 out=None enable_pdl=None",
    "norm.fused_add_rmsnorm": "input residual weight eps=1e-06 enable_pdl=None",
    "norm.gemma_fused_add_rmsnorm": "input residual weight eps=1e-06 enable_pdl=None",
    "activation.silu_and_mul": "input out=None enable_pdl=None",
    "activation.gelu_and_mul": "input out=None enable_pdl=None",
    "activation.gelu_tanh_and_mul": "input out=None enable_pdl=None",
    "rope.apply_rope": f"q k indptr offsets {ROPE}",
    "rope.apply_rope_inplace": f"q k indptr offsets {ROPE}",
    "rope.apply_rope_pos_ids": f"q k pos_ids {ROPE}",
    "rope.apply_rope_pos_ids_inplace": f"q k pos_ids {ROPE}",
    "rope.apply_llama31_rope": f"q k indptr offsets {LLAMA31_ROPE}",
    "rope.apply_llama31_rope_pos_ids_inplace": f"q k pos_ids {LLAMA31_ROPE}",
    "rope.apply_rope_with_cos_sin_cache": "positions query key head_size cos_sin_cache is_neox=True",
    "rope.apply_rope_with_cos_sin_cache_inplace": "positions query key head_size cos_sin_cache is_neox=True",
    "quantization.packbits": "x bitorder='big'",
    "quantization.segment_packbits": "x indptr bitorder='big'",
    "gemm.mm_bf16": "a b bias=None pdl=False out=None out_dtype=None backend='cudnn'",
    "gemm.bmm_bf16": "A B out=None out_dtype=None backend='cudnn'",
    "jit.gen_jit_spec": (
        "name sources extra_cflags=None extra_cuda_cflags=None extra_ldflags=None extra_include_paths=None "
        "needs_device_linking=False"
    ),
    "jit.build_jit_specs": "specs verbose=False skip_prebuilt=True",
    "jit.JitSpec.build": "verbose=False need_lock=True",
    "jit.JitSpec.build_and_load": "class_name=None",
    "jit.gen_single_decode_module": f"dtype_q dtype_kv dtype_o head_dim_qk head_dim_vo {MODULE_OPTIONS}",
    "jit.gen_batch_decode_module": f"dtype_q dtype_kv dtype_o dtype_idx head_dim_qk head_dim_vo {MODULE_OPTIONS}",
    "jit.gen_single_prefill_module": (
        f"backend dtype_q dtype_kv dtype_o head_dim_qk head_dim_vo {MODULE_OPTIONS} use_fp16_qk_reduction=False"
    ),
    "jit.gen_batch_prefill_module": (
        f"backend dtype_q dtype_kv dtype_o dtype_idx head_dim_qk head_dim_vo {MODULE_OPTIONS} "
        "use_fp16_qk_reduction=False"
    ),
    "jit.gen_act_and_mul_module": "act_func_name act_func_def=None",
    "api_logging.flashinfer_api": "func=None * trace=None",
    "api_logging.replay_from_dump": "dump_dir compare_outputs=False device='cuda' run=False object_registry=None",
    "api_logging.replay_sequence": "root_dir device='cuda'",
    "utils.check_shape_dtype_device": "x expected_shape expected_dtype expected_device name",
    "utils.backend_requirement": "backend_checks common_check=None heuristic_func=None",
    "testing.utils.bench_gpu_time": (
        "fn dry_run_iters=None repeat_iters=None dry_run_time_ms=25 repeat_time_ms=100 l2_flush=None "
        "l2_flush_size_mb=None l2_flush_device=None sleep_after_run=False enable_cupti=False use_cuda_graph=False "
        "num_iters_within_graph=10 input_args=() input_kwargs=None cold_l2_cache=True"
    ),
    "decode.single_decode_with_kv_cache": (
        "q k v kv_layout='NHD' pos_encoding_mode='NONE' use_tensor_cores=False q_scale=None k_scale=None v_scale=None "
        "window_left=-1 logits_soft_cap=None sm_scale=None rope_scale=None rope_theta=None return_lse=False"
    ),
    "prefill.single_prefill_with_kv_cache": (
        "q k v scale_q=None scale_k=None scale_v=None o_dtype=None custom_mask=None packed_custom_mask=None "
        "causal=False kv_layout='NHD' pos_encoding_mode='NONE' use_fp16_qk_reduction=False sm_scale=None "
        "window_left=-1 logits_soft_cap=None rope_scale=None rope_theta=None backend='auto' return_lse=False "
        "kv_cache_sf=None k_scale=None v_scale=None"
    ),
    "autotuner.autotune": "tune_mode=True cache=None tuning_buckets=None round_up=None skip_ops=None",
    "autotuner.AutoTuner.choose_one": "custom_op runners tuning_config inputs",
    "autotuner.AutoTuner.search_cache": "custom_op runners input_shapes tuning_config inputs=None",
    "autotuner.AutoTuner.rank_tactics": "custom_op runners tuning_config inputs k=1",
    "autotuner.AutoTuner.save_configs": "path",
    "autotuner.AutoTuner.load_configs": "path",
    "autotuner.TunableRunner.get_valid_tactics": "inputs profile",
    "autotuner.TunableRunner.forward": "inputs tactic=-1 do_preparation=False",
    "autotuner.make_bucket_mapper": "buckets round_map=False",
    "autotuner.round_to_nearest_bucket": "x buckets round_map=False",
    "compilation_context.CompilationContext.get_nvcc_flags_list": "supported_major_versions=None",
    "aot.compile_and_package_modules": (
        "out_dir build_dir=None project_root=None config=None verbose=False skip_prebuilt=True"
    ),
    "decode.single_decode_with_kv_cache_with_jit_module": (
        "jit_module q k v * kv_layout='NHD' window_left=-1 return_lse=False"
    ),
    "prefill.single_prefill_with_kv_cache_with_jit_module": (
        "jit_module q k v * kv_layout='NHD' mask_mode=0 window_left=-1 return_lse=False"
    ),
    "decode.BatchDecodeWithPagedKVCacheWrapper": (
        "float_workspace_buffer kv_layout='NHD' use_cuda_graph=False use_tensor_cores=False "
        "paged_kv_indptr_buffer=None paged_kv_indices_buffer=None paged_kv_last_page_len_buffer=None backend='auto' "
        "jit_args=None"
    ),
    "decode.BatchDecodeWithPagedKVCacheWrapper.plan": DECODE_PLAN,
    "decode.BatchDecodeWithPagedKVCacheWrapper.begin_forward": DECODE_PLAN,
    "decode.BatchDecodeWithPagedKVCacheWrapper.run": (
        f"q paged_kv_cache {RUN} window_left=None sinks=None q_len_per_req=None "
        "skip_softmax_threshold_scale_factor=None kv_cache_sf=None"
    ),
    "decode.BatchDecodeWithPagedKVCacheWrapper.forward": (
        "q paged_kv_cache pos_encoding_mode='NONE' q_scale=None k_scale=None v_scale=None window_left=-1 "
        "logits_soft_cap=None sm_scale=None rope_scale=None rope_theta=None"
    ),
    "decode.BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer": "float_workspace_buffer int_workspace_buffer",
    "decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper": (
        "workspace_buffer indptr_buffer indices_buffer last_page_len_buffer kv_layout='NHD' use_tensor_cores=False"
    ),
    "prefill.BatchPrefillWithPagedKVCacheWrapper": f"{PREFILL_BUFFERS} jit_args=None jit_kwargs=None",
    "prefill.BatchPrefillWithPagedKVCacheWrapper.plan": PAGED_PLAN,
    "prefill.BatchPrefillWithPagedKVCacheWrapper.begin_forward": PAGED_PLAN,
    "prefill.BatchPrefillWithPagedKVCacheWrapper.run": (
        f"q paged_kv_cache {RUN} window_left=None sinks=None kv_cache_sf=None"
    ),
    "prefill.BatchPrefillWithPagedKVCacheWrapper.forward": (
        "q paged_kv_cache causal=False pos_encoding_mode='NONE' use_fp16_qk_reduction=False k_scale=None v_scale=None "
        "window_left=-1 logits_soft_cap=None sm_scale=None rope_scale=None rope_theta=None"
    ),
    "prefill.BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer": "float_workspace_buffer int_workspace_buffer",
    "prefill.BatchPrefillWithRaggedKVCacheWrapper": (
        "float_workspace_buffer kv_layout='NHD' use_cuda_graph=False qo_indptr_buf=None kv_indptr_buf=None "
        "custom_mask_buf=None mask_indptr_buf=None backend='auto' jit_args=None jit_kwargs=None"
    ),
    "prefill.BatchPrefillWithRaggedKVCacheWrapper.plan": RAGGED_PLAN,
    "prefill.BatchPrefillWithRaggedKVCacheWrapper.begin_forward": RAGGED_PLAN,
    "prefill.BatchPrefillWithRaggedKVCacheWrapper.run": f"q k v {RUN} o_scale=None kv_cache_sf=None",
    "prefill.BatchPrefillWithRaggedKVCacheWrapper.forward": (
        "q k v causal=False pos_encoding_mode='NONE' use_fp16_qk_reduction=False window_left=-1 logits_soft_cap=None "
        "sm_scale=None rope_scale=None rope_theta=None"
    ),
    "attention.BatchAttention": "kv_layout='NHD' device='cuda'",
    "attention.BatchAttention.plan": (
        "qo_indptr kv_indptr kv_indices kv_len_arr num_qo_heads num_kv_heads head_dim_qk head_dim_vo page_size "
        "causal=False sm_scale=None logits_soft_cap=None q_data_type='bfloat16' kv_data_type='bfloat16' "
        "use_profiler=False"
    ),
    "attention.BatchAttention.run": (
        "q kv_cache out=None lse=None k_scale=None v_scale=None logits_soft_cap=0.0 profiler_buffer=None "
        "kv_cache_sf=None"
    ),
    "attention.BatchAttentionWithAttentionSinkWrapper": (
        f"{PREFILL_BUFFERS} pos_encoding_mode='NONE' use_fp16_qk_reduction=False q_data_type='bfloat16' "
        "kv_data_type='bfloat16' head_dim_qk=128 head_dim_vo=128 window_left=-1"
    ),
    "attention.BatchAttentionWithAttentionSinkWrapper.run": "q paged_kv_cache sink sm_scale",
    "pod.PODWithPagedKVCacheWrapper": (
        "float_workspace_buffer kv_layout='NHD' use_cuda_graph=False paged_kv_indptr_buffer=None "
        "paged_kv_indices_buffer=None paged_kv_last_page_len_buffer=None jit_args=None"
    ),
    "pod.PODWithPagedKVCacheWrapper.plan": (
        "indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode='NONE' "
        "window_left=-1 q_data_type='float16' kv_data_type=None data_type=None sm_scale=None rope_scale=None "
        "rope_theta=None non_blocking=True"
    ),
    "pod.PODWithPagedKVCacheWrapper.run": (
        "q_p k_p v_p q_d paged_kv_cache_d custom_mask_p=None packed_custom_mask_p=None causal_p=False "
        "kv_layout_p='NHD' pos_encoding_mode_p='NONE' sm_scale_p=None window_left_p=-1 rope_scale_p=None "
        "rope_theta_p=None return_lse_p=False custom_mask_d=None packed_custom_mask_d=None causal_d=False "
        "kv_layout_d='NHD' pos_encoding_mode_d='NONE' sm_scale_d=None window_left_d=-1 rope_scale_d=None "
        "rope_theta_d=None q_scale=None k_scale=None v_scale=None return_lse_d=False use_fp16_qk_reduction=False "
        "enable_pdl=None"
    ),
    "cascade.merge_state": "v_a s_a v_b s_b",
    "cascade.merge_state_in_place": "v s v_other s_other mask=None",
    "cascade.merge_states": "v s",
    "cascade.MultiLevelCascadeAttentionWrapper": (
        "num_levels float_workspace_buffer kv_layout='NHD' use_cuda_graph=False qo_indptr_buf_arr=None "
        "paged_kv_indptr_buf_arr=None paged_kv_indices_buf_arr=None paged_kv_last_page_len_buf_arr=None"
    ),
    "cascade.MultiLevelCascadeAttentionWrapper.plan": (
        "qo_indptr_arr paged_kv_indptr_arr paged_kv_indices_arr paged_kv_last_page_len num_qo_heads num_kv_heads "
        "head_dim page_size causal=False pos_encoding_mode='NONE' use_fp16_qk_reduction=False sm_scale=None "
        "window_left=-1 logits_soft_cap=None rope_scale=None rope_theta=None q_data_type='float16' kv_data_type=None"
    ),
    "cascade.MultiLevelCascadeAttentionWrapper.run": "q paged_kv_cache",
    "cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper": "float_workspace_buffer kv_layout='NHD'",
    "cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.begin_forward": (
        "unique_kv_indptr unique_kv_indices unique_kv_last_page_len num_qo_heads num_kv_heads head_dim page_size "
        "data_type='float16'"
    ),
    "cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward": (
        "q k_shared v_shared unique_kv_cache allow_fp16_qk_reduction=False sm_scale=None rope_scale=None "
        "rope_theta=None"
    ),
    "cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper": "float_workspace_buffer kv_layout='NHD'",
    "cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.begin_forward": (
        "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim page_size"
    ),
    "cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.forward": (
        "q k_shared v_shared unique_kv_cache causal=False use_fp16_qk_reduction=False sm_scale=None rope_scale=None "
        "rope_theta=None"
    ),
    "sparse.BlockSparseAttentionWrapper": "float_workspace_buffer backend='auto'",
    "sparse.BlockSparseAttentionWrapper.plan": (
        # FlashInfer's o_data_type is 'float16'; here it follows q, which its own default makes the same.
        "indptr indices M N R C num_qo_heads num_kv_heads head_dim mask=None packed_mask=None causal=False "
        "pos_encoding_mode='NONE' use_fp16_qk_reduction=False logits_soft_cap=None sm_scale=None rope_scale=None "
        "rope_theta=None q_data_type='float16' kv_data_type=None o_data_type=None non_blocking=True block_mask=None"
    ),
    "sparse.BlockSparseAttentionWrapper.run": (
        "q k v scale_q=None scale_k=None scale_v=None out=None lse=None return_lse=False enable_pdl=None"
    ),
    "sparse.BlockSparseAttentionWrapper.forward": SPARSE_FORWARD,
    "sparse.VariableBlockSparseAttentionWrapper": "float_workspace_buffer backend='auto'",
    "sparse.VariableBlockSparseAttentionWrapper.plan": (
        "block_mask_map block_row_sz block_col_sz num_qo_heads num_kv_heads head_dim causal=False "
        "pos_encoding_mode='NONE' use_fp16_qk_reduction=False logits_soft_cap=None sm_scale=None rope_scale=None "
        "rope_theta=None non_blocking=True q_data_type='float16' kv_data_type=None"
    ),
    "sparse.VariableBlockSparseAttentionWrapper.run": "q k v out=None lse=None return_lse=False enable_pdl=None",
    "sparse.VariableBlockSparseAttentionWrapper.forward": SPARSE_FORWARD,
    "sparse.convert_bsr_mask_layout": "mask indptr",
    "norm.rmsnorm_quant": "out input weight scale eps=1e-06 enable_pdl=None",
    "norm.fused_add_rmsnorm_quant": "out input residual weight scale eps=1e-06 enable_pdl=None",
    "norm.layernorm": "input gemma beta eps=1e-06",
    "norm.layernorm_quant": "out input gemma beta scale eps=1e-06",
    "rope.rope_quantize_fp8": ROPE_QUANTIZE,
    "rope.mla_rope_quantize_fp8": ROPE_QUANTIZE,
    "rope.rope_quantize_fp8_append_paged_kv_cache": (
        "q_rope k_rope q_nope k_nope v cos_sin_cache pos_ids paged_kv_cache kv_indices kv_indptr batch_indices "
        "positions is_neox=True quantize_dtype=None quant_scale_q=1.0 quant_scale_kv=1.0 page_size=16 kv_layout='NHD' "
        "q_rope_out=None q_nope_out=None enable_pdl=False"
    ),
    "quantization.per_token_group_quant_8bit": (
        "x group_size eps=1e-10 dst_dtype=None column_major_scales=False scale_tma_aligned=False scale_ue8m0=False"
    ),
    "quantization.mxfp8_quantize": (
        "input is_sf_swizzled_layout=True alignment=32 enable_pdl=None backend='cuda' sf_swizzle_layout=None"
    ),
    "quantization.mxfp8_dequantize_host": ("input scale_tensor is_sf_swizzled_layout=True sf_swizzle_layout=None"),
    "quantization.fp4_quantize": (
        "input global_scale=None sf_vec_size=16 sf_use_ue8m0=False is_sf_swizzled_layout=True is_sf_8x4_layout=False "
        "is_global_scale_inversed=False enable_pdl=None backend='cuda'"
    ),
    "quantization.e2m1_and_ufp8sf_scale_to_float": (
        "e2m1_tensor ufp8_scale_tensor global_scale_tensor=None sf_vec_size=16 ufp8_type=1 is_sf_swizzled_layout=True"
    ),
    "quantization.mxfp4_quantize": "a backend='cuda' enable_pdl=None",
    "page.get_batch_indices_positions": "append_indptr seq_lens nnz batch_indices=None positions=None",
    "page.get_seq_lens": "kv_indptr kv_last_page_len page_size",
    "page.append_paged_kv_cache": (
        "append_key append_value batch_indices positions paged_kv_cache kv_indices kv_indptr kv_last_page_len "
        "kv_layout='NHD'"
    ),
    "mla.BatchMLAPagedAttentionWrapper": (
        "float_workspace_buffer use_cuda_graph=False qo_indptr=None kv_indptr=None kv_indices=None kv_len_arr=None "
        "backend='auto'"
    ),
    "mla.BatchMLAPagedAttentionWrapper.plan": (
        "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal sm_scale "
        "q_data_type kv_data_type use_profiler=False"
    ),
    "mla.BatchMLAPagedAttentionWrapper.run": (
        "q_nope q_pe ckv_cache kpe_cache out=None lse=None return_lse=False profiler_buffer=None kv_len=None "
        "page_table=None return_lse_base_on_e=False o_scale=None * ckv_scale=None ckv_scale_arr=None kpe_scale=None"
    ),
    "decode.BatchDecodeMlaWithPagedKVCacheWrapper": (
        "float_workspace_buffer use_cuda_graph=False use_tensor_cores=False paged_kv_indptr_buffer=None "
        "paged_kv_indices_buffer=None paged_kv_last_page_len_buffer=None"
    ),
    "decode.BatchDecodeMlaWithPagedKVCacheWrapper.plan": (
        "indptr indices last_page_len num_qo_heads head_dim_compressed_kv page_size sm_scale window_left=-1 "
        "logits_soft_cap=None data_type='float16' q_data_type=None rope_scale=None rope_theta=None"
    ),
    "decode.BatchDecodeMlaWithPagedKVCacheWrapper.run": (
        # FlashInfer's enable_pdl is False, "a placeholder"; here None takes it where the device has it.
        "q_nope q_pe paged_ckv_cache paged_kpe_cache q_scale=None k_scale=None v_scale=None out=None lse=None "
        "return_lse=False enable_pdl=None"
    ),
    "page.append_paged_mla_kv_cache": (
        "append_ckv append_kpe batch_indices positions ckv_cache kpe_cache kv_indices kv_indptr kv_last_page_len"
    ),
    "gemm.SegmentGEMMWrapper": "float_workspace_buffer backend='auto'",
    "gemm.SegmentGEMMWrapper.run": (
        "x weights batch_size weight_column_major out=None seg_lens=None seg_indptr=None weight_indices=None"
    ),
    "gemm.SegmentGEMMWrapper.reset_workspace_buffer": "float_workspace_buffer int_workspace_buffer",
    "gemm.bmm_fp8": "A B A_scale B_scale dtype out=None backend='cublas'",
    "gemm.mm_fp8": "a b alpha=None out_dtype='bfloat16' out=None backend='trtllm_low_latency'",
    "gemm.mm_bf16_swiglu": "a b * pdl=False out=None",
    "gemm.gemm_fp8_nt_groupwise": (
        "a b a_scale b_scale scale_major_mode=None mma_sm=1 scale_granularity_mnk=(1,128,128) out=None out_dtype=None "
        "backend='cutlass'"
    ),
    "gemm.gemm_fp8_nt_blockscaled": "a b a_scale b_scale scale_major_mode='MN' mma_sm=1 out=None out_dtype=None",
    "gemm.group_gemm_fp8_nt_groupwise": (
        "a b a_scale b_scale m_indptr scale_granularity_mnk=(1,128,128) scale_major_mode='MN' mma_sm=1 out=None "
        "out_dtype=None"
    ),
    "gemm.group_deepgemm_fp8_nt_groupwise": (
        "a b a_scale b_scale m_indices scale_granularity_mnk=(1,128,128) out=None out_dtype=None"
    ),
    "gemm.batch_deepgemm_fp8_nt_groupwise": (
        "a b a_scale b_scale masked_m expected_m scale_granularity_mnk=(1,128,128) out=None out_dtype=None"
    ),
    "gemm.fp8_blockscale_gemm_sm90": "input weight input_scale=None weight_scale=None out=None out_dtype=None",
    "fused_moe.fused_topk_deepseek": (
        "scores bias n_group topk_group topk routed_scaling_factor topk_values topk_indices launch_with_pdl=True "
        "routing_replay_out=None"
    ),
    "fused_moe.cutlass_fused_moe": (
        "input token_selected_experts token_final_scales fc1_expert_weights fc2_expert_weights output_dtype "
        "quant_scales fc1_expert_biases=None fc2_expert_biases=None input_sf=None swiglu_alpha=None swiglu_beta=None "
        "swiglu_limit=None tp_size=1 tp_rank=0 ep_size=1 ep_rank=0 cluster_size=1 cluster_rank=0 output=None "
        "enable_alltoall=False use_deepseek_fp8_block_scale=False use_w4_group_scaling=False "
        "use_mxfp8_act_scaling=False min_latency_mode=False tune_max_num_tokens=8192 enable_pdl=None activation_type=3"
    ),
}

#: Positional parameters that FlashInfer requires and ours lets out: (function, parameter) -> default here.
MILDER = {
    ("decode.BatchDecodeWithPagedKVCacheWrapper", "float_workspace_buffer"): None,  # or workspace_buffer=
    ("decode.BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer", "int_workspace_buffer"): None,
    ("prefill.BatchPrefillWithPagedKVCacheWrapper.reset_workspace_buffer", "int_workspace_buffer"): None,
    ("attention.BatchAttentionWithAttentionSinkWrapper.run", "sink"): None,  # or sinks=
    ("attention.BatchAttentionWithAttentionSinkWrapper.run", "sm_scale"): None,  # that of the plan
    ("gemm.SegmentGEMMWrapper.reset_workspace_buffer", "int_workspace_buffer"): None,
    ("fused_moe.cutlass_fused_moe", "quant_scales"): None,  # 16-bit weights have none
    # One choice of kernel for all devices; FlashInfer's names are accepted where it has several.
    ("gemm.mm_bf16", "backend"): "auto",
    ("gemm.bmm_bf16", "backend"): "auto",
    ("gemm.bmm_fp8", "backend"): "auto",
    ("gemm.mm_fp8", "backend"): "auto",
    ("gemm.mm_fp8", "out_dtype"): None,  # bfloat16, or that of out
    ("gemm.gemm_fp8_nt_groupwise", "backend"): "auto",
    ("gemm.gemm_fp8_nt_groupwise", "scale_major_mode"): "MN",  # which None means, too
}


def find(name):
    value = flashinfer
    for part in name.split("."):
        value = getattr(value, part)
    return value


def parse(text):
    """([(positional name, default)], {keyword-only name: default})."""
    positional, keywords, by_keyword = [], {}, False
    for word in text.split():
        if word == "*":
            by_keyword = True
            continue
        name, has_default, default = word.partition("=")
        value = eval(default) if has_default else NO
        if by_keyword:
            keywords[name] = value
        else:
            positional.append((name, value))
    return positional, keywords


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters_and_their_order(name):
    positional, keywords = parse(SIGNATURES[name])
    function = find(name)
    ours = inspect.signature(function).parameters
    have = [(p.name, p.default) for p in ours.values() if p.kind is P.POSITIONAL_OR_KEYWORD and p.name != "self"]
    wanted = [(n, MILDER.get((name, n), d)) for n, d in positional]
    assert have == wanted
    for keyword, default in keywords.items():
        assert keyword in ours, f"{keyword} is missing"
        assert ours[keyword].kind is P.KEYWORD_ONLY and ours[keyword].default == default
    required = [p.name for p in ours.values() if p.kind is P.KEYWORD_ONLY and p.default is NO]
    assert not required, "a call in FlashInfer's form would fail"


@pytest.mark.parametrize("family", ["decode.BatchDecodeWithPaged", "prefill.BatchPrefillWithPaged",
                                    "prefill.BatchPrefillWithRagged"])  # fmt: skip
def test_extra_tensors_of_variants_follow_by_position(family):
    kinds = [p.kind for p in inspect.signature(find(f"{family}KVCacheWrapper.run")).parameters.values()]
    assert P.VAR_POSITIONAL in kinds


@pytest.mark.parametrize(
    "name",
    ["decode.BatchDecodeWithPagedKVCacheWrapper", "prefill.BatchPrefillWithPagedKVCacheWrapper",
     "prefill.BatchPrefillWithRaggedKVCacheWrapper", "sparse.BlockSparseAttentionWrapper",
     "sparse.VariableBlockSparseAttentionWrapper", "cascade.MultiLevelCascadeAttentionWrapper",
     "attention.BatchAttentionWithAttentionSinkWrapper"],
)  # fmt: skip
def test_methods_under_their_old_and_new_names(name):
    wrapper = find(name)
    for method in ("plan", "begin_forward", "run", "run_return_lse", "forward", "forward_return_lse", "end_forward",
                   "workspace_size", "reset_workspace_buffer"):  # fmt: skip
        assert callable(getattr(wrapper, method)), method


def test_workspace_size_takes_the_arguments_of_plan():
    """`workspace_size` passes its arguments on to what reads those of `plan`: the same names, in the same order."""
    from fi_cupy import decode_plan

    for wrapper, prepare, skip in (
        (flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper, decode_plan.prepare, 3),
        (flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper, None, 2),
        (flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper, None, 2),
    ):
        plan = list(inspect.signature(wrapper.plan).parameters)[1:]
        read = inspect.signature(prepare or wrapper._prepare).parameters
        short = {
            "paged_kv_indptr": "kv_indptr", "paged_kv_indices": "kv_indices", "paged_kv_last_page_len": "last_page_len"
        }  # fmt: skip
        expected = [n if n in read else short[n] for n in plan]
        assert list(read)[skip:] == expected
