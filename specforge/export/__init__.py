"""Drafts as serving engines load them: written in their layouts, checked by a reader of its own, and read back."""
