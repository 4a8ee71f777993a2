"""The README.md of an exported folder: export_card.md, filled in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

import yaml

from llava_core.checkpoint import Checkpoint
from llava_core.projector import parameter_count


def model_card(checkpoint: Checkpoint, dtype: str, licences: Sequence[str]) -> str:
    """What it is, how to load it, its figures and where it comes from, under a YAML header for the Hub."""
    trained = checkpoint.provenance
    encoder, llm = trained.encoder.get("model_id"), trained.language_model["id"]
    header = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": [encoder, llm],
        "tags": ["llava", "llava-align", "custom_code"],
    }
    template = Template(Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))
    return template.substitute(
        checkpoint.projector.config,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        encoder=encoder,
        fingerprint=trained.fingerprint,
        llm=llm,
        llm_weights=trained.language_model["weights_sha256"],
        parameters=f"{parameter_count(checkpoint.projector):,}",
        dtype=dtype,
        figures="\n".join(f"| {name} | {value} |" for name, value in checkpoint.metrics.items()),
        terms="see " + " and ".join(licences) if licences else "not found beside them: ask their publishers",
    )
