"""What keeps this collection: the notebooks as callables, their agreement, published figures, Colab, and the README."""
