"""A small world to try everything on: pictures of shapes, captions by rule, and small frozen models."""
