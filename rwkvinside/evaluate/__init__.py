"""How good a student is: quality beside its teacher, speed of decoding and of training."""
