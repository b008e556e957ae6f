"""The same work on many processes and machines, whatever becomes of them."""
