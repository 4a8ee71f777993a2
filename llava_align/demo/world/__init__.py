"""The built-in world: drawn pictures of shapes, rule-based captions, and small frozen models."""
