"""The packages of the wheel are the folders of the tree: the root is `moec`, and they are found below it."""

from setuptools import find_packages, setup

PARTS = ("compiler", "passes", "targets")

found = find_packages(include=[name for part in PARTS for name in (part, f"{part}.*")])
# the root holds this file too: setuptools leaves out of a package the script that it knows by its name
setup(script_name="setup.py", packages=["moec", *(f"moec.{name}" for name in found)])
