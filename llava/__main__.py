"""`python -m llava` from a checkout, the old name of `python -m llava_align`. In no wheel."""

from llava_align.__main__ import main

if __name__ == "__main__":
    main()
