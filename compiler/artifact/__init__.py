"""What is on disk: the manifest moec.json, folders that appear whole or not at all, and the user's cache."""
