"""Ranking by click probability: rows of users, their packing, metrics, the synthetic world."""
