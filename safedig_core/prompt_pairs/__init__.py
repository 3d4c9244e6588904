"""Prompt pairs and safe prompts for dictionaries of full-size models."""
