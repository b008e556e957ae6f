"""Steering that is learned by gradient: vectors by three losses, and weights by two fine-tunes."""
