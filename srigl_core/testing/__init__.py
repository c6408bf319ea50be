"""Laws that every backend obeys, and the problems they are tried on."""
