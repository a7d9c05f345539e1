"""Profiles of chips as data, one a TOML file; `../profile.py` reads them."""
