"""What keeps this collection: the notebooks as callables, published figures, Colab, the README."""
