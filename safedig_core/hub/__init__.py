"""The Hugging Face Hub and the index."""
