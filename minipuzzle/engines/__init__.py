"""What other programs do with the result: the memory that they take."""
