"""Training methods: how a batch becomes a loss. One file a method; nothing outside this package knows their names."""
