"""`llava export --to gguf`: a checkpoint and its models as files that llama.cpp and Ollama run."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path

from infer.answerer import ImageAnswerer
from llava_align.hub.config import ExportConfig
from llava_align.hub.export_folder import copy_licences, new_folder, require_space
from llava_align.hub.gguf_file import require_llama_cpp, write_gguf
from llava_align.hub.gguf_language import language_model
from llava_align.hub.gguf_mmproj import PADDING, mmproj, sent_tokens
from llava_align.hub.llama_cpp import MMPROJ, MODEL
from llava_align.hub.modelfile import modelfile
from llava_core.cli.console import progress, say
from llava_core.filesystem import sha256_files
from llava_core.projector.aligned import load_its_language_model
from llava_core.projector.checkpoint import load_checkpoint
from llava_core.sha256sums import write_sums
from llava_core.types import JsonDict
from llava_core.vision.open import open_trained_tower
from llava_core.vision.tower import VisionTower

CHECKED = 8
"""Pictures about which answers are compared by default."""


def run(config: ExportConfig) -> JsonDict:
    """Write the folder, then compare llama.cpp's answers with those of `infer`.

    Raises LlavaError for what llama.cpp cannot compute, or if the disk is too small.
    """
    if config.dtype == "q4_k_m":
        require_llama_cpp("--dtype q4_k_m")
    checkpoint = load_checkpoint(config.checkpoint)
    tower = open_trained_tower(config.vision, checkpoint.provenance)
    llm = load_its_language_model(checkpoint, config.llm)
    projector = checkpoint.projector
    seen, graph = mmproj(tower, projector, llm.embedding_rms, half=config.dtype != "float32")
    architecture, values, tensors = language_model(llm, config.dtype)
    say_differences(tower, str(seen["clip.projector_type"]), sent_tokens(tower, projector))
    size = sum(tensor.nbytes for tensor in [*graph, *tensors])
    require_space(config.out, size, config.dtype, config.dry_run)
    summary: JsonDict = {"out": str(config.out), "bytes": size, "dtype": config.dtype}
    if config.dry_run:
        return summary
    with new_folder(config.out) as partial:
        with progress(len(graph) + len(tensors), "tensors") as bar:
            write_gguf(partial / MODEL, architecture, values, tensors, bar)
            write_gguf(partial / MMPROJ, "clip", seen, graph, bar)
        (partial / "Modelfile").write_text(modelfile(llm), encoding="utf-8")
        copy_licences({"vision": config.vision, "llm": config.llm}, partial)
        write_sums(partial, {path.name: sha256_files([path]) for path in partial.iterdir()})
    count = CHECKED if config.check is None else config.check
    if count and importlib.util.find_spec("xllamacpp"):
        from llava_align.hub.gguf_check import compare, pictures

        question = checkpoint.provenance.question
        aligned = ImageAnswerer(tower, projector, llm, question)
        summary |= compare(config.out, aligned, pictures(config.check_images, count))
    elif count:
        say("the answers of llama.cpp were not compared with those of infer: pip install xllamacpp")
    say_how_to_run(config.out)
    return summary


def say_differences(tower: VisionTower, graph: str, sent: slice | None) -> None:
    """Print where llama.cpp b11549 does something else than `infer`, a line for each."""
    if sent is not None:
        say(
            "llama.cpp leaves out the first patch and sends the class token last "
            "(ggml-org/llama.cpp#25814): answers differ; those of a linear projector with --visual-tokens "
            "pool or shuffle do not"
        )
    fit, ground = tower.preprocess.crop, tuple(int(255 * mean) for mean in tower.preprocess.mean)
    if fit != "pad" or ground != PADDING[graph]:
        own = f"with {ground}" if fit == "pad" else f"by {fit}"
        say(
            f"llama.cpp makes pictures square by padding them with {PADDING[graph]}, this projector was "
            f"trained on pictures made square {own}: give it square ones"
        )


def say_how_to_run(folder: Path) -> None:
    place = shlex.quote(str(folder))
    files = f"-m {place}/{MODEL} --mmproj {place}/{MMPROJ} -fa off"
    say(f"llama-server {files}")
    say(f"llama-mtmd-cli {files} --temp 0 --image FILE -p QUESTION")
    say(f"ollama create NAME -f {place}/Modelfile")
