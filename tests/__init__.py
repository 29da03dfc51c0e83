"""Tests: plain functions that prove a number or an equality."""
