"""The `moec` command: one file a group of commands, and how they show things to people."""

from .commands import main

__all__ = ["main"]
