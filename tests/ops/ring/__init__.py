"""Tests of ring attention, mirroring `sptransform/ops/ring`."""
