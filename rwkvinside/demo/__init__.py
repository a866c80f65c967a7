"""The whole path on one small machine, from text to a hybrid that generates."""
