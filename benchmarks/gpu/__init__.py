"""Where this project stands on the GPU at hand, in one command: `python3 -m benchmarks.gpu --out DIR`."""
