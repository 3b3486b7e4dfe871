"""The quantized Hugging Face cache: layers, block store, layout, padding, footprint."""
