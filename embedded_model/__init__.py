"""What made the embedded model: grammar, training, choice of the preset, evaluation, card."""
