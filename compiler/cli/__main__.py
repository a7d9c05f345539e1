"""The `moec` command as `python -m moec.compiler.cli`, where its script is not on the path."""

from .commands import main

main(prog_name="moec")
