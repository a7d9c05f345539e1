"""What is on disk: the manifest moec.json, and folders that appear whole or not at all."""
