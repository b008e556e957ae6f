"""Serving: the same steering in other engines."""
