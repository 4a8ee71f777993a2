"""Shared by extract, train and infer: files, devices, models, feature shards, projectors, the console."""

__version__ = "0.1.0"
