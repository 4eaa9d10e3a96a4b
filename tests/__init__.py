"""The tests of sptransform; a package, so that worker processes can import what they are asked to run."""
