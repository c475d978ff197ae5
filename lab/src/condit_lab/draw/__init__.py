"""Training of the embedded text-to-icon MM-DiT with transparency: data, linear RGBA code, text tower, trainer."""
