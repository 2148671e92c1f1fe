"""Tokens a second of transformers' `generate` with fi_cupy's attention and with sdpa's, on a model of random weights.

``python bench/generate_transformers.py [new tokens [batch:prompt ...]]``: a Llama of SmolLM2-135M's sizes in bf16,
greedy, dynamic cache.
"""

from __future__ import annotations

import sys
import time

import torch
import transformers

from fi_cupy.interop import transformers as ours

SIZES = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def main() -> None:
    new = int(sys.argv[1]) if len(sys.argv) > 1 else 64
    cases = [tuple(map(int, case.split(":"))) for case in sys.argv[2:]] or [(1, 128), (16, 512), (64, 1024)]
    ours.register()
    for batch, prompt in cases:
        ids = torch.randint(2, 49152, (batch, prompt), device="cuda")
        row = []
        for attention in ("sdpa", "fi_cupy"):
            torch.manual_seed(0)
            config = transformers.LlamaConfig(**SIZES)
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            model = model.eval().to("cuda", torch.bfloat16)
            options = {"do_sample": False, "attention_mask": torch.ones_like(ids)}
            model.generate(ids, max_new_tokens=4, **options)
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, max_new_tokens=new, **options)
            torch.cuda.synchronize()
            row.append(f"{attention} {batch * new / (time.perf_counter() - start):9.0f} tok/s")
        print(f"batch {batch:3d}, prompt {prompt:5d}, {new} new: {', '.join(row)}", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
