"""From text to token ids: formats, conversions, the token store, samples."""
