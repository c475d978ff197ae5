"""Rulers: what measures pictures, how well it does so, and the report on any method's folder (docs/evaluate.md)."""
