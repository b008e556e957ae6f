"""One call that chooses where and how strongly to steer, and says how far it can be trusted."""
