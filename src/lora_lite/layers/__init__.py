"""The kinds of layers: one file a kind, which is all that there is to say about it."""
