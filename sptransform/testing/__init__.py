"""For tests of what users add: whether a sharding rule is right."""

from sptransform.testing.rule_check import check_rule

__all__ = ["check_rule"]
