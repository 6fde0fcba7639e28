"""What is measured of the neuromorphic system: what its memories are worth, and how long they last."""
