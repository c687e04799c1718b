"""The losses, one file each; the `objective` annotations of recipe/recipes.py say which command has which."""
