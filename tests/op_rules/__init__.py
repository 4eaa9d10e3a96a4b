"""Every sharding rule against what it claims, one file per table of :mod:`sptransform.op_rules`."""
