"""Named sets of flags: `--recipe fast` stands for these, and a flag that is given besides wins."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "course": {
        "start": "torch",
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.0,
        "warmup": 0.03,
        "decay": "cosine",
        "batch_size": 16,
        "epochs": 1,
    },
    "fast": {
        "start": "captions",
        "optimizer": "muon",
        "lr": 0.05,
        "warmup": 0.03,
        "decay": "linear",
        "batch_size": 16,
    },
    "course-stage2": {
        "tune": "llm",
        "optimizer": "adamw",
        "lr": 2e-5,
        "lr_llm": 2e-5,
        "weight_decay": 0.0,
        "grad_clip": 1.0,
        "warmup": 0.03,
        "decay": "cosine",
        "batch_size": 4,
        "epochs": 1,
        "max_text_tokens": 512,
    },
    "stage2": {
        "tune": "lora",
        "lora_rank": 64,
        "lora_alpha": 64,
        "lr": 2e-4,
        "grad_clip": 1.0,
        "warmup": 0.03,
        "decay": "linear",
        "batch_size": 16,
        "max_text_tokens": 512,
    },
}
"""course, course-stage2: what the course project trains with. fast: its held-out loss in a fifth of the steps
(benchmarks/RESULTS.md, Time to quality); give it `--max-steps`. stage2: the LoRA that did best of four on the
demo's world (Stage 2 there), with the default --lr-llm, which was measured with SmolLM2-135M: the demo's rate
suits a model of 1 M parameters only."""
