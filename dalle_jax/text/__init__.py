"""Text: captions to token ids by trained and public vocabularies."""
