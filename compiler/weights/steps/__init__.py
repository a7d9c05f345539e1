"""The steps of recipes, each declared once: the type of its result, its evaluation for a box, what else is known of it."""
