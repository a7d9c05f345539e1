"""The version of moec; a file of its own, so that nothing below has to import the face of the package."""

__version__ = "0.1.0"
