"""SafeDIG: steering text-to-image transformers with transferable sparse dictionaries."""

__version__ = "0.1.0"
