"""Imports torch programs that nobody prepared: live modules, exported programs, `.pt2` files."""
