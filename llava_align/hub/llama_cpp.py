"""llama.cpp itself (xllamacpp), in a process of its own, which a failed assertion in it may end.

As a program (`python -m llava_align.hub.llama_cpp FOLDER TOKENS`), it reads one chat request a line, as
/v1/chat/completions takes them, and writes one answer a line.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from llava_core.errors import LlavaError
from llava_core.types import JsonDict

MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
"""Files of an exported folder."""


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    """Tokens of question and picture."""


Ask = Callable[[bytes, str, int], Answer]
"""An image file, a question and the most tokens of an answer -> the greedy answer."""


@contextlib.contextmanager
def llama_cpp(folder: Path, context: int) -> Iterator[Ask]:
    """llama.cpp with the files in `folder`, for at most `context` tokens. Raises LlavaError if it ends."""
    command = [sys.executable, "-m", __name__, str(folder), str(context)]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=-1, stdout=-1, stderr=log, text=True) as process,
    ):
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None
        assert stdout is not None

        def ask(image: bytes, question: str, max_tokens: int) -> Answer:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(json.dumps(_request(image, question, max_tokens)) + "\n")
                stdin.flush()
            reply: JsonDict = json.loads(stdout.readline() or "{}")
            if "choices" not in reply:
                raise LlavaError(
                    f"llama.cpp cannot answer with {folder}",
                    got=reply.get("error") or _first_error(log, process.wait()),
                    do="the files are written; --check 0 asks nothing",
                )
            text = reply["choices"][0]["message"]["content"] or ""
            return Answer(text.strip(), reply["usage"]["prompt_tokens"])

        try:
            yield ask
        finally:
            process.terminate()


def png(pixels: np.ndarray) -> bytes:
    """u1 [H, W, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _request(image: bytes, question: str, max_tokens: int) -> JsonDict:
    url = f"data:image/png;base64,{base64.b64encode(image).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "top_k": 1,
        "cache_prompt": False,
    }


def _first_error(log: io.BufferedRandom, code: int) -> str:
    """What it says of the first error, and how it ended."""
    log.seek(0)
    lines = [line.decode(errors="replace").strip() for line in log if line.strip()]
    telling = [line for line in lines if " E " in line or "ASSERT" in line] or lines[-1:]
    return f"exit code {code}: {' '.join(telling[:1])[:300]}"


def main(folder: str, context: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where llama.cpp prints, too
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = f"{folder}/{MODEL}", f"{folder}/{MMPROJ}"
    parameters.n_ctx, parameters.n_parallel, parameters.cache_ram_mib = int(context), 1, 0
    parameters.warmup = parameters.ui = False
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers, parameters.mmproj_use_gpu = 0, False
    server = xllamacpp.Server(parameters)
    for line in sys.stdin:
        replies.write(json.dumps(server.handle_chat_completions(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
