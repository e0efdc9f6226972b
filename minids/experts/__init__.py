"""What runs many experts at once."""
