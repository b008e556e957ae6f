"""What is wrong with a steering, and what it left behind."""
