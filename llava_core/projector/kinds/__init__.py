"""Kinds of projector, by the names in `llava_core/registry.py`: a file each, imported when asked for."""
