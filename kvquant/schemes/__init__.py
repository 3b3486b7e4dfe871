"""Cache schemes. A scheme is one file with a codec and one entry in `registry.CODECS`."""
