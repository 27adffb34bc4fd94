"""Pictures and captions: sources of rows, decoding, the input pipeline, codes encoded ahead."""
