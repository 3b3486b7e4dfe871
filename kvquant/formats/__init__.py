"""File formats and packed data: sealed files, codes, blocked sparse matrices, RoPE."""
