"""What extract, train and infer share."""

__version__ = "0.1.0"
