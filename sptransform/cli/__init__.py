"""The command ``sptransform``: explain, compare, verify, doctor, calibrate."""
