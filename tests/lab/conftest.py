"""Fixtures that several files of this folder share."""

from class_tasks import pets, vae  # noqa: F401
