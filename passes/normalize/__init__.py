"""Passes on the captured single-device graph, which rewrite it into forms that rules shard best."""
