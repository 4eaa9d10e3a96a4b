"""Strategies side by side for one model, what their counts are as formulas, and the choice among them."""
