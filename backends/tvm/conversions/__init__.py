"""What becomes of each ATen operator in Relax, where TVM has no conversion or one that is wrong for us."""
