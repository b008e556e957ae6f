"""Everything that made the embedded model: grammar, training, the choice of its preset, its evaluation and its card."""
