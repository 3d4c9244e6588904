"""The dictionary file."""
