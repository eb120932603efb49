"""Hugging Face at the border, and the only room that imports transformers."""
