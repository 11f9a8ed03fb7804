"""Update rules: what a step does to an element, one file each."""

from .base import UpdateRule

__all__ = ["UpdateRule"]
