"""Formats of files and of packed data: sealed files, codes, blocked sparse matrices, RoPE."""
