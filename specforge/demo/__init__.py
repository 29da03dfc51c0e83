"""The embedded target: corpus, conversations, recipe and weights of the quickstart."""
