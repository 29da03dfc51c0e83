"""Network pieces that drafts share."""
