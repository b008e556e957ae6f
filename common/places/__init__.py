"""Where steering acts: blocks, parts of blocks, tokens, and what libraries call them."""
