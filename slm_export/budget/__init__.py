"""The best recipe within limits of size, memory, speed and quality."""
