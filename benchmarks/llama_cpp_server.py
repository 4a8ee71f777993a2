"""llama.cpp's own server (xllamacpp) on a free port, until it is terminated.

python -m benchmarks.llama_cpp_server FOLDER SLOTS CLIENTS, with a folder of `llava export --to gguf`.
"""

from __future__ import annotations

import os
import sys
import threading

SLOT_TOKENS = 1024
"""Context of each slot."""


def main(folder: str, slots: str, clients: str) -> None:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.mmproj.path = f"{folder}/model.gguf", f"{folder}/mmproj.gguf"
    parameters.port, parameters.n_parallel, parameters.n_ctx = 0, int(slots), int(slots) * SLOT_TOKENS
    parameters.n_threads_http = int(clients) + 8  # each stream holds one
    threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.n_gpu_layers, parameters.mmproj_use_gpu, parameters.ui = 0, False, False
    server = xllamacpp.Server(parameters)
    sys.stderr.write(f"llama.cpp at {server.listening_address} \n")
    sys.stderr.flush()
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
