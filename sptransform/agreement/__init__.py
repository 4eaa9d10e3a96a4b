"""Ranks agree on what they run before they communicate."""
