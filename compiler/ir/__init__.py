"""What a program is: types over named dims, weights as recipes, functions and modules, and the syntax of their texts."""
