"""What is added: activations read, steering vectors trained and saved, activation additions."""
