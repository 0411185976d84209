"""The tests that run inside the lab's machine, as root."""
