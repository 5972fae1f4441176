"""The private copy of a model that calls run on."""
