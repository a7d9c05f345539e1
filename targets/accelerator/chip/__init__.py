"""What is known of a chip: profiles as data, how they are read, checked and shown."""
