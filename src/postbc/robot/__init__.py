"""The robot loop: play at a fixed rate, let a person reset and label, keep every episode, compare agents blindly."""
