"""Train language models from human feedback, from the command line."""

__version__ = "0.1.0"
